"""A GGUF file's tensors under the names and in the layout of a Hugging Face checkpoint.

The model says which tensors its checkpoints have, the `gguf` library what each is called in the file. What is
stored otherwise there than in Hugging Face's files is a rule here, by architecture, both ways: reading makes a
checkpoint's tensor from the file's, writing (gguf_write_layout.py) takes it apart again.

- Rotary embeddings turn pairs of neighbours in what llama.cpp calls its normal kind, so that rows of queries and
  keys were reordered for checkpoints that turn halves: Llama's own and those built on its code.
- Gemma's norms multiply by 1 + weight, and the file has the sum.
- GPT-2's linear layers are written as [in, out] by Hugging Face and as [out, in] here.
- GPT-NeoX has the query, key and value of each head side by side, the file all queries, all keys, all values.
- Experts are one tensor a projection, [E, out, in], and Hugging Face's a tensor each or gate and up together.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchtune.checkpoint.gguf import GGUFHeader
from torchtune.checkpoint.headers import TensorHeader, WeightSource
from torchtune.checkpoint.layouts import as_halves, as_pairs
from torchtune.errors import CheckpointError, UnsupportedError
from torchtune.models.build import build_model
from torchtune.models.config import HFConfig
from torchtune.modules.stored import as_stored, stored_tensors

logger = logging.getLogger(__name__)

# They are in the config: what each rotary frequency is divided by.
ROPE_TENSORS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
# Endings that are a part of the name for Hugging Face and say where a tensor belongs in the file.
UNLIKE_NAMES = {
    ".self_attn.sinks": ".self_attn.sinks.weight",
    ".e_score_correction_bias": ".e_score_correction.bias",
    ".experts.down_proj": ".experts.down_proj.weight",
    ".experts.down_proj_bias": ".experts.down_proj.bias",
}


@dataclass(frozen=True)
class Part:
    """A tensor of the file, or one index of its first dimension."""

    name: str
    index: int | None = None


def unchanged(tensor: Tensor) -> Tensor:
    """What most tensors need."""
    return tensor


def alone(tensor: Tensor) -> tuple[Tensor, ...]:
    """The inverse of `unchanged`."""
    return (tensor,)


@dataclass(frozen=True)
class Origin:
    """What a checkpoint's tensor is made from. Both ways are also called with meta tensors, for the shapes.

    Attributes:
        make: the checkpoint's tensor, from the parts.
        take_apart: its inverse: the parts, from the checkpoint's tensor.
    """

    parts: tuple[Part, ...]
    make: Callable[..., Tensor] = unchanged
    take_apart: Callable[[Tensor], tuple[Tensor, ...]] = alone


class GGUFNames:
    """What the tensors of a checkpoint are in a file of an architecture.

    Args:
        library: `gguf`.
        config: the model's config.json.
        has: whether a file that is read has a tensor; where one is written none is there, and the newest layout wins.
    """

    def __init__(
        self,
        library: Any,
        architecture: str,
        config: Mapping[str, Any],
        has: Callable[[str], bool] = lambda name: False,
    ) -> None:
        number = {name: number for number, name in library.MODEL_ARCH_NAMES.items()}[architecture]
        self._names = library.get_tensor_name_map(number, config_layers(config))
        self._rules = RULES.get(architecture, ())
        self.config = config
        self.has = has

    def origin(self, name: str) -> Origin:
        """Of a checkpoint's tensor, by its Hugging Face name."""
        for pattern, rule in self._rules:
            if match := re.search(pattern, name):
                return rule(self, match)
        return Origin((self.part(name),))

    def part(self, name: str, index: int | None = None) -> Part:
        """The file's tensor, or part of it, for a Hugging Face name; what has no name in the file is 'None' there."""
        for ending, written in UNLIKE_NAMES.items():
            if name.endswith(ending):
                name = name.removesuffix(ending) + written
        if expert := re.search(r"\.experts\.(\d+)\.", name):
            name, index = name.replace(expert[0], ".experts."), int(expert[1])
        stem, _, suffix = name.rpartition(".")
        return Part(f"{self._names.get_name(stem)}.{suffix}", index)


class GGUFWeights(WeightSource):
    """The tensors of a GGUF file as those of a Hugging Face checkpoint.

    Attributes:
        config: the model's config.json.
        headers: by Hugging Face name. They are float32 when all of the file is, else bfloat16.

    Args:
        config: the config.json that the file amounts to.

    Raises:
        UnsupportedError: tensors that have no place in the model; names them.
    """

    def __init__(self, file: GGUFHeader, config: Mapping[str, Any]) -> None:
        self._file = file
        with torch.device("meta"):
            model = build_model(config)
        names = GGUFNames(file.library, file.architecture, config, has=file.tensors.__contains__)
        self.config = config
        shapes = {name: tuple(tensor.shape) for name, tensor in as_stored(model, stored_tensors(model))}
        self._origins: dict[str, Origin] = {}
        self.headers: dict[str, TensorHeader] = {}
        saved_as = torch.float32 if file.is_float32 else torch.bfloat16
        for name, shape in shapes.items():
            origin = names.origin(name)
            if all(part.name in file.tensors for part in origin.parts):
                self._origins[name], found = self._in_shape(origin, shape)
                self.headers[name] = TensorHeader(found, saved_as, file.tensors[origin.parts[0].name].file)
        self._check_all_used()

    def read(self, name: str) -> Tensor:
        """One tensor as float32 on the CPU."""
        origin = self._origins[name]
        parts = [torch.from_numpy(self._file.read(part.name, part.index)) for part in origin.parts]
        return origin.make(*parts).contiguous()

    def close(self) -> None:
        """Nothing is held open but the mapping, which ends with this object."""

    def _shape(self, origin: Origin) -> tuple[int, ...]:
        shapes = [self._part_shape(part) for part in origin.parts]
        if origin.make is unchanged:
            return shapes[0]
        try:
            return tuple(origin.make(*(torch.empty(shape, device="meta") for shape in shapes)).shape)
        except RuntimeError as error:
            named = ", ".join(f"'{part.name}' {shape}" for part, shape in zip(origin.parts, shapes, strict=True))
            raise CheckpointError(f"{named} does not fit its metadata: {error}", path=self._file.path) from error

    def _part_shape(self, part: Part) -> tuple[int, ...]:
        shape = self._file.tensors[part.name].shape
        if part.index is not None and part.index >= shape[0]:
            raise CheckpointError(f"tensor '{part.name}' has {shape[0]} parts", path=self._file.path)
        return shape if part.index is None else shape[1:]

    def _in_shape(self, origin: Origin, shape: tuple[int, ...]) -> tuple[Origin, tuple[int, ...]]:
        """With the dimensions of size one that the file leaves out; the shape that comes of it."""
        made = self._shape(origin)
        if made != shape and [size for size in made if size > 1] == [size for size in shape if size > 1]:
            return Origin(origin.parts, lambda *parts: origin.make(*parts).reshape(shape)), shape
        return origin, made

    def _check_all_used(self) -> None:
        file = self._file
        indices: dict[str, set[int | None]] = {}
        for origin in self._origins.values():
            for part in origin.parts:
                indices.setdefault(part.name, set()).add(part.index)
        for name, used in indices.items():
            if None not in used and len(used) != file.tensors[name].shape[0]:
                raise CheckpointError(
                    f"tensor '{name}' has {file.tensors[name].shape[0]} parts where its metadata says {len(used)}",
                    path=file.path,
                )
        further = self._further_layers()
        if further:
            logger.warning("%s: the %d tensors that predict further tokens are left out", file.path, len(further))
        if unknown := sorted(set(file.tensors) - set(indices) - ROPE_TENSORS - further):
            raise UnsupportedError(
                f"{file.path}: {len(unknown)} tensors have no place in a model of architecture '{file.architecture}': "
                f"{', '.join(unknown[:5])}"
            )

    def _further_layers(self) -> set[str]:
        """Tensors of layers behind the model's, where the file says that there are such."""
        if not self._file.get("nextn_predict_layers"):
            return set()
        blocks = {name: re.match(r"blk\.(\d+)\.", name) for name in self._file.tensors}
        return {name for name, block in blocks.items() if block and int(block[1]) >= config_layers(self.config)}


Rule = Callable[[GGUFNames, "re.Match[str]"], Origin]


def config_layers(config: Mapping[str, Any]) -> int:
    """The number of layers, under whichever key."""
    return int(config.get("num_hidden_layers") or config["n_layer"])


def changed(change: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Rule:
    """The file's tensor, changed; `back` is what the file has of the checkpoint's."""
    return lambda names, match: Origin((names.part(match.string),), change, lambda tensor: (back(tensor),))


def gate_and_up(
    join: Callable[[Tensor, Tensor], Tensor],
    part: Callable[[Tensor], tuple[Tensor, ...]],
    suffix: str,
    *,
    shared: bool = False,
) -> Rule:
    """Gate and up of all experts, or of the shared one, in one tensor; `part` is the inverse of `join`."""
    kind = "shexp" if shared else "exps"

    def rule(names: GGUFNames, match: re.Match[str]) -> Origin:
        layer = re.search(r"\.(\d+)\.", match.string)
        assert layer is not None
        parts = tuple(Part(f"blk.{layer[1]}.ffn_{which}_{kind}.{suffix}") for which in ("gate", "up"))
        return Origin(parts, join, part)

    return rule


def _halves(names: GGUFNames, match: re.Match[str]) -> Origin:
    head_dim = HFConfig(names.config).head_dim
    change = partial(as_halves, head_dim=head_dim)
    return Origin((names.part(match.string),), change, lambda weight: (as_pairs(weight, head_dim),))


def _heads_side_by_side(names: GGUFNames, match: re.Match[str]) -> Origin:
    num_heads = names.config["num_attention_heads"]

    def change(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (3, num_heads, -1)).transpose(0, 1).flatten(0, 2)

    def back(weight: Tensor) -> tuple[Tensor, ...]:
        return (weight.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).flatten(0, 2),)

    return Origin((names.part(match.string),), change, back)


def _head_norm(names: GGUFNames, match: re.Match[str]) -> Origin:
    """StableLM 2 has a norm for each head, the file all of them as one tensor."""
    return Origin((Part(f"blk.{match['layer']}.attn_{match['which']}_norm.weight", int(match["head"])),))


def _kv_b(names: GGUFNames, match: re.Match[str]) -> Origin:
    """DeepSeek's expansion of keys and values: newer files have them apart, the keys' transposed in each head."""
    whole = names.part(match.string)
    if names.has(whole.name):
        return Origin((whole,))
    keys, values = (Part(whole.name.replace("attn_kv_b", name)) for name in ("attn_k_b", "attn_v_b"))

    def apart(weight: Tensor) -> tuple[Tensor, ...]:
        heads, num_keys = (
            weight.unflatten(0, (names.config["num_attention_heads"], -1)),
            names.config["qk_nope_head_dim"],
        )
        return heads[:, :num_keys].transpose(1, 2), heads[:, num_keys:]

    return Origin((keys, values), lambda k, v: torch.cat([k.transpose(1, 2), v], dim=1).flatten(0, 1), apart)


def _interleaved(gate: Tensor, up: Tensor) -> Tensor:
    return torch.stack([gate, up], dim=2).flatten(1, 2)


def _by_turns(both: Tensor) -> tuple[Tensor, ...]:
    return both[:, ::2], both[:, 1::2]


TRANSPOSED = changed(lambda weight: weight.transpose(-2, -1), lambda weight: weight.transpose(-2, -1))
LLAMA_ROTARY = (r"\.(?P<which>[qk])_proj\.(weight|bias)$", _halves)
ONE_PLUS_NORMS = (r"norm\.weight$", changed(lambda weight: weight - 1, lambda weight: weight + 1))

RULES: dict[str, Sequence[tuple[str, Rule]]] = {
    "llama": [LLAMA_ROTARY],
    "mistral3": [LLAMA_ROTARY],
    "granite": [LLAMA_ROTARY],
    "granitemoe": [
        LLAMA_ROTARY,
        (
            r"shared_mlp\.input_linear\.weight$",
            gate_and_up(lambda g, u: torch.cat([g, u]), lambda both: both.chunk(2), "weight", shared=True),
        ),
        (
            r"\.input_linear\.weight$",
            gate_and_up(lambda g, u: torch.cat([g, u], dim=1), lambda both: both.chunk(2, dim=1), "weight"),
        ),
    ],
    "smollm3": [LLAMA_ROTARY],
    "llama4": [
        (
            r"experts\.gate_up_proj$",
            gate_and_up(
                lambda g, u: torch.cat([g, u], dim=1).transpose(1, 2),
                lambda both: both.transpose(1, 2).chunk(2, dim=1),
                "weight",
            ),
        ),
        (r"experts\.down_proj$", TRANSPOSED),
    ],
    "gemma": [ONE_PLUS_NORMS],
    "gemma2": [ONE_PLUS_NORMS],
    "gemma3": [ONE_PLUS_NORMS],
    "gpt2": [(r"\.(c_attn|c_proj|c_fc)\.weight$", TRANSPOSED)],
    "gptneox": [(r"\.query_key_value\.(weight|bias)$", _heads_side_by_side)],
    "stablelm": [
        (r"\.(?P<layer>\d+)\.self_attn\.(?P<which>[qk])_layernorm\.norms\.(?P<head>\d+)\.weight$", _head_norm)
    ],
    "deepseek2": [(r"\.kv_b_proj\.weight$", _kv_b)],
    "gpt-oss": [
        (
            r"experts\.gate_up_proj$",
            gate_and_up(
                lambda g, u: _interleaved(g, u).transpose(1, 2),
                lambda both: _by_turns(both.transpose(1, 2)),
                "weight",
            ),
        ),
        (r"experts\.gate_up_proj_bias$", gate_and_up(_interleaved, _by_turns, "bias")),
        (r"experts\.down_proj$", TRANSPOSED),
    ],
}
