"""What a GGUF file is going to say, read back before it is written: it must be the same model.

The header goes through the reader (gguf_config.py, gguf_layout.py), and the model that comes of it is compared with
the checkpoint's part by part: sizes, scales, windows, frequencies, routers. So no option is lost unseen.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchtune.checkpoint.gguf import GGUFHeader, GGUFTensor
from torchtune.checkpoint.gguf_config import hf_config
from torchtune.checkpoint.gguf_layout import GGUFWeights
from torchtune.checkpoint.gguf_write_file import PlannedTensor
from torchtune.checkpoint.gguf_write_keys import with_defaults
from torchtune.errors import CheckpointError, UnsupportedError
from torchtune.models.build import build_model
from torchtune.models.config import HFConfig
from torchtune.modules.stored import stored_shapes

# What no number depends on: how a checkpoint names or lays out its tensors, and what training alone uses.
NOT_COMPUTED = {
    *("prefix_choices", "stored_prefixes", "carried", "names_in_transformers", "peft_swaps_experts"),
    *("layout", "layouts", "router_loss", "training", "keep_router_logits"),
}
# Options that a reader's config has only where the architecture's files can say them.
NOT_EVERYWHERE = ("sliding_window", "attention_chunk_size", "clip_qkv", "qk_layernorm", "use_qk_norm")
# Keys of a file hold floats of 32 bits.
ROUNDING = 1e-6


class PlannedFile(GGUFHeader):
    """A header as its reader will see it.

    Args:
        values: the tensors that are known already: rotary factors.
    """

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, Any],
        tensors: Mapping[str, PlannedTensor],
        values: Mapping[str, Tensor],
    ) -> None:
        super().__init__(path)
        self.metadata = {key: _as_read(value) for key, value in metadata.items()}
        self.tensors = {
            name: GGUFTensor(name, tensor.shape, tensor.kind.number(self.library), path, 0)
            for name, tensor in tensors.items()
        }
        self._values = values

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """One of the known tensors."""
        return self._values[name].numpy()


def prove_same_model(file: PlannedFile, config: Mapping[str, Any]) -> None:
    """Compare what a file will be read as with the model that it is of.

    Args:
        config: the model's config.json, of the text alone.
    Raises:
        UnsupportedError: an option that such a file can't say; names it and its value.
    """
    try:
        found = hf_config(file)
        weights = GGUFWeights(file, found)
        with torch.device("meta"):
            ours, read = build_model(config), build_model(found)
    except (UnsupportedError, CheckpointError) as error:
        problem = error.problem if isinstance(error, CheckpointError) else str(error)
        raise UnsupportedError(
            f"as a GGUF file of architecture '{file.architecture}' it could not be read: {problem}"
        ) from error
    different = _first_difference(ours, read)
    if different is None and stored_shapes(ours) != {name: header.shape for name, header in weights.headers.items()}:
        different = "its tensors"
    if different is not None:
        raise UnsupportedError(
            f"it can't be written to a GGUF file of architecture '{file.architecture}': "
            f"{_named(config, found) or different}; export it with format=safetensors"
        )


def _as_read(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_read(item) for item in value]
    return float(np.float32(value)) if isinstance(value, float) else value


def _named(config: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The keys of the config that would be read as something else."""
    values = with_defaults(config)
    told = ("architectures", "torch_dtype", "model_type", "rope_theta", "rope_scaling")
    different = [
        f"{key}: {values.get(key)!r} would be read as {value!r}"
        for key, value in found.items()
        if key not in told and values.get(key) is not None and not key.endswith("_token_id")
        if not _alike(values.get(key), value)
    ]
    different += [
        f"{key}: {values.get(key)!r} would be lost" for key in NOT_EVERYWHERE if values.get(key) and key not in found
    ]
    return "; ".join(different)


def _first_difference(ours: nn.Module, read: nn.Module) -> str | None:
    """The first part of two models that is not the same in both, with its values."""
    theirs = dict(read.named_modules())
    for name, module in ours.named_modules():
        other = theirs.pop(name, None)
        if type(other) is not type(module):
            return f"{name or 'the model'} would be {type(other).__name__}, not {type(module).__name__}"
        for key, value in vars(module).items():
            if key not in NOT_COMPUTED and not key.startswith("_") and not _alike(value, vars(other).get(key)):
                return f"{name}.{key}: {value} would be read as {vars(other).get(key)}"
    return f"{next(iter(theirs))} is not in it" if theirs else None


def _alike(one: Any, other: Any) -> bool:
    """Whether two options are the same, functions by their code and what they hold."""
    if isinstance(one, (bool, str, type(None))):
        return bool(one == other)
    if isinstance(one, (int, float)):
        return isinstance(other, (int, float)) and abs(one - other) <= ROUNDING * abs(one)
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and (one.is_meta or torch.allclose(one, other, rtol=ROUNDING, atol=0))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, partial):
        return _alike((one.func, one.args, one.keywords), (other.func, other.args, other.keywords))
    if isinstance(one, MethodType):
        return one.__func__ is other.__func__
    if isinstance(one, FunctionType):
        return one.__code__ is other.__code__ and _alike(_held(one), _held(other))
    if isinstance(one, nn.Module):
        return True  # compared by itself
    return one is other or (hasattr(one, "__dict__") and _alike(_public(one), _public(other))) or bool(one == other)


def _public(instance: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(instance).items() if not key.startswith("_")}


def _held(function: FunctionType) -> list[Any]:
    """What a function has from outside it; of a config, the keys that it reads."""
    held: list[Any] = []
    for cell in function.__closure__ or ():
        value = cell.cell_contents
        if isinstance(value, HFConfig):
            held += [value.get(name) for name in function.__code__.co_names]
        else:
            held.append(value)
    return held
