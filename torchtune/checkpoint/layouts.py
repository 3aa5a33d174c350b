"""Weights under other names and in other layouts than Hugging Face's, and the way from them.

Meta's releases and the first library's checkpoints are told by the names of their tensors, whatever the file is
called. Both keep the rows of queries and keys in pairs that turn together; Hugging Face keeps the first of all
pairs before the second of all (Su et al., 2021, arXiv:2104.09864, turns pairs).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchtune.checkpoint.headers import TensorHeader, WeightSource
from torchtune.distributed.part import Part
from torchtune.errors import CheckpointError, UnsupportedError
from torchtune.models.config import HFConfig

logger = logging.getLogger(__name__)

Names = Mapping[str, str]

META: Names = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.*.attention_norm.weight": "model.layers.*.input_layernorm.weight",
    "layers.*.attention.wq.weight": "model.layers.*.self_attn.q_proj.weight",
    "layers.*.attention.wk.weight": "model.layers.*.self_attn.k_proj.weight",
    "layers.*.attention.wv.weight": "model.layers.*.self_attn.v_proj.weight",
    "layers.*.attention.wo.weight": "model.layers.*.self_attn.o_proj.weight",
    "layers.*.ffn_norm.weight": "model.layers.*.post_attention_layernorm.weight",
    "layers.*.feed_forward.w1.weight": "model.layers.*.mlp.gate_proj.weight",
    "layers.*.feed_forward.w2.weight": "model.layers.*.mlp.down_proj.weight",
    "layers.*.feed_forward.w3.weight": "model.layers.*.mlp.up_proj.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
FIRST_LIBRARY: Names = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.*.sa_norm.scale": "model.layers.*.input_layernorm.weight",
    "layers.*.attn.q_proj.weight": "model.layers.*.self_attn.q_proj.weight",
    "layers.*.attn.k_proj.weight": "model.layers.*.self_attn.k_proj.weight",
    "layers.*.attn.v_proj.weight": "model.layers.*.self_attn.v_proj.weight",
    "layers.*.attn.output_proj.weight": "model.layers.*.self_attn.o_proj.weight",
    "layers.*.mlp_norm.scale": "model.layers.*.post_attention_layernorm.weight",
    "layers.*.mlp.w1.weight": "model.layers.*.mlp.gate_proj.weight",
    "layers.*.mlp.w2.weight": "model.layers.*.mlp.down_proj.weight",
    "layers.*.mlp.w3.weight": "model.layers.*.mlp.up_proj.weight",
    "norm.scale": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
QWEN: Names = {
    **FIRST_LIBRARY,
    "layers.*.attn.q_proj.bias": "model.layers.*.self_attn.q_proj.bias",
    "layers.*.attn.k_proj.bias": "model.layers.*.self_attn.k_proj.bias",
    "layers.*.attn.v_proj.bias": "model.layers.*.self_attn.v_proj.bias",
    "layers.*.attn.q_norm.scale": "model.layers.*.self_attn.q_norm.weight",
    "layers.*.attn.k_norm.scale": "model.layers.*.self_attn.k_norm.weight",
}
GEMMA2: Names = {
    **FIRST_LIBRARY,
    "layers.*.sa_scale.scale": "model.layers.*.post_attention_layernorm.weight",
    "layers.*.mlp_norm.scale": "model.layers.*.pre_feedforward_layernorm.weight",
    "layers.*.mlp_scale.scale": "model.layers.*.post_feedforward_layernorm.weight",
}
# Several under one name are one tensor there, in this order.
PHI3: Names = {
    **FIRST_LIBRARY,
    "layers.*.attn.q_proj.weight": "model.layers.*.self_attn.qkv_proj.weight",
    "layers.*.attn.k_proj.weight": "model.layers.*.self_attn.qkv_proj.weight",
    "layers.*.attn.v_proj.weight": "model.layers.*.self_attn.qkv_proj.weight",
    "layers.*.mlp.w1.weight": "model.layers.*.mlp.gate_up_proj.weight",
    "layers.*.mlp.w3.weight": "model.layers.*.mlp.gate_up_proj.weight",
}


@dataclass(frozen=True)
class Layout:
    """How weights are named and laid out.

    Attributes:
        owner: for people.
        names: from each tensor's name, with a star for the number of its layer, to Hugging Face's.
        in_pairs: whether rows of queries and keys are in pairs; else they are as Hugging Face has them.
    """

    owner: str
    names: Names
    in_pairs: bool


META_LAYOUT = Layout("Meta's", META, in_pairs=True)
FIRST = "the first library's"
# By the model_type of the config.json that belongs to the file.
LAYOUTS: Mapping[str, Mapping[str, Layout]] = {
    "Meta's": {"llama": META_LAYOUT, "mistral": META_LAYOUT},
    FIRST: {
        "llama": Layout(FIRST, FIRST_LIBRARY, in_pairs=True),
        "mistral": Layout(FIRST, FIRST_LIBRARY, in_pairs=True),
        "gemma": Layout(FIRST, FIRST_LIBRARY, in_pairs=True),
        "gemma2": Layout(FIRST, GEMMA2, in_pairs=True),
        "qwen2": Layout(FIRST, QWEN, in_pairs=False),
        "qwen3": Layout(FIRST, QWEN, in_pairs=False),
        "phi3": Layout(FIRST, PHI3, in_pairs=False),
    },
}
# Made anew from the config.
DROPPED = re.compile(r"(.*\.)?rope\.freqs")
LAYER = re.compile(r"^layers\.(\d+)\.")


@dataclass(frozen=True)
class _Origin:
    """The stored tensors that make up one of Hugging Face's, one after the other along the rows."""

    parts: tuple[str, ...]
    in_pairs: bool


class TranslatedWeights(WeightSource):
    """Weights of another layout as those of a Hugging Face checkpoint.

    Args:
        stored: under the names of their files.
        head_dim: rows of a head.
    Raises:
        CheckpointError: a tensor that the layout doesn't know; names it and its file.
    """

    def __init__(self, stored: WeightSource, layout: Layout, *, head_dim: int) -> None:
        self._stored = stored
        self._head_dim = head_dim
        self._origins = _origins(stored.headers, layout)
        self.headers = {name: self._header(origin) for name, origin in self._origins.items()}

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU."""
        origin = self._origins[name]
        parts = [self._stored.read(part) for part in origin.parts]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return as_halves(whole, self._head_dim) if origin.in_pairs else whole

    def read_part(self, name: str, part: Part) -> Tensor:
        """A part of one tensor."""
        origin = self._origins[name]
        if len(origin.parts) > 1 or origin.in_pairs:
            return super().read_part(name, part)
        return self._stored.read_part(origin.parts[0], part)

    def close(self) -> None:
        """Let go of the files."""
        self._stored.close()

    def _header(self, origin: _Origin) -> TensorHeader:
        first, *others = [self._stored.headers[part] for part in origin.parts]
        if not others:
            return first
        num_rows = first.shape[0] + sum(other.shape[0] for other in others)
        return TensorHeader((num_rows, *first.shape[1:]), first.dtype, first.file)


def in_hugging_face_layout(stored: WeightSource, config: Mapping[str, Any]) -> WeightSource:
    """Weights under Hugging Face's names: as they are, or translated where their names are of another layout.

    Raises:
        CheckpointError: names of several layouts in one checkpoint, or one that its layout doesn't know.
        UnsupportedError: a layout that isn't known for the config's model_type, or an adapter.
    """
    owners = _owners(stored.headers)
    if not owners:
        return stored
    if len(owners) > 1:
        raise _mixed(stored.headers, *owners.items())
    (owner, mark) = next(iter(owners.items()))
    model_type = str(config.get("model_type"))
    by_type = LAYOUTS[owner]
    if model_type not in by_type:
        raise UnsupportedError(
            f"{stored.headers[mark].file}: {owner} layout (tensor '{mark}') is known for {', '.join(by_type)}, "
            f"not for '{model_type}'"
        )
    if model_type == "gemma2" and owner == FIRST:
        # Its release 0.6.1 put the two norms around the feed-forward the wrong way round when it read a Gemma 2.
        logger.warning(
            "%s: the first library trained Gemma 2 with the norms before and after the feed-forward exchanged; they are "
            "read in the places in which they were trained, not in those from which they came",
            stored.headers[mark].file,
        )
    return TranslatedWeights(stored, by_type[model_type], head_dim=HFConfig(config).head_dim)


def as_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of each head from pairs (0, 1), (2, 3), ... to the first of all pairs before the second of all."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def as_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `as_halves`."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _starred(name: str) -> str:
    return LAYER.sub("layers.*.", name)


def _owners(names: Mapping[str, TensorHeader]) -> dict[str, str]:
    """Whose layers are among the names, with an example; outside the layers names may be anyone's."""
    marks = {
        key: owner
        for owner, by_type in LAYOUTS.items()
        for layout in by_type.values()
        for key in layout.names
        if LAYER.match(key.replace("*", "0"))
    }
    found: dict[str, str] = {}
    for name in names:
        if owner := marks.get(_starred(name)):
            found.setdefault(owner, name)
    return found


def _mixed(names: Mapping[str, TensorHeader], one: tuple[str, str], two: tuple[str, str]) -> CheckpointError:
    return CheckpointError(
        f"holds a mix of layouts: tensor '{one[1]}' is {one[0]}, '{two[1]}' ({names[two[1]].file.name}) is {two[0]}. "
        "Whether queries and keys are in pairs can't be told, so it is not read; use the files it was made from",
        path=names[one[1]].file,
    )


def _origins(names: Mapping[str, TensorHeader], layout: Layout) -> dict[str, _Origin]:
    parts: dict[str, list[str]] = {}
    for name in names:
        if DROPPED.fullmatch(name):
            continue
        translated = layout.names.get(_starred(name))
        if translated is None:
            raise _unknown(name, names, layout)
        layer = LAYER.match(name)
        translated = translated.replace("*", layer[1]) if layer else translated
        parts.setdefault(translated, []).append(name)
    return {
        translated: _Origin(_in_order(found, translated, names, layout), layout.in_pairs and _turns(translated))
        for translated, found in parts.items()
    }


def _turns(name: str) -> bool:
    return bool(re.search(r"\.self_attn\.[qk]_proj\.", name))


def _in_order(found: list[str], translated: str, names: Mapping[str, TensorHeader], layout: Layout) -> tuple[str, ...]:
    layer = LAYER.match(found[0])
    number = layer[1] if layer else ""
    wanted = [key.replace("*", number) for key, name in layout.names.items() if name.replace("*", number) == translated]
    if missing := [name for name in wanted if name not in found]:
        raise CheckpointError(
            f"tensor '{missing[0]}' is missing, a part of '{translated}'", path=names[found[0]].file.parent
        )
    return tuple(wanted)


def _unknown(name: str, names: Mapping[str, TensorHeader], layout: Layout) -> Exception:
    file = names[name].file
    if re.search(r"\.(lora_[ab]|magnitude)\b", name):
        return UnsupportedError(f"{file}: tensor '{name}' is an adapter's; name the checkpoint that it belongs to")
    mark = next(other for other in names if _starred(other) in layout.names and LAYER.match(other))
    if name.startswith(("model.", "lm_head.")):
        return _mixed(names, (layout.owner, mark), ("Hugging Face's", name))
    return CheckpointError(f"tensor '{name}' is not known in {layout.owner} layout", path=file)
