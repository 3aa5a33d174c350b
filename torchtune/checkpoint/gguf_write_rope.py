"""How a GGUF file says that rotary frequencies are stretched: by keys, or by a tensor of what each is divided by."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchtune.checkpoint.gguf_config import LOG_MULTIPLIERS, ROPE_FREQS, ROPE_LONG, ROPE_SHORT
from torchtune.errors import UnsupportedError
from torchtune.models.config import HFConfig
from torchtune.modules.rotary import build_rotary

# `original_max_position_embeddings` and the two borders that a reader finds again from the tensor.
LLAMA3_ORIGINAL, LLAMA3_BORDERS = 8192, ((1.0, 4.0), (1.0, 1.0))


def rope_scaling(
    config: HFConfig, rope: dict[str, Any], architecture: str, library: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Keys of the architecture, and tensors by their names in the file; both empty where nothing is stretched.

    Args:
        rope: the options in the newer spelling.
    Raises:
        UnsupportedError: a kind, or an option of one, that the architecture's files don't have.
    """
    kind = rope["rope_type"]
    if kind == "default":
        return {}, {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}, {}
    if kind == "yarn":
        return _yarn(config, rope, architecture), {}
    if kind == "llama3" and _has(library, architecture, "ROPE_FREQS"):
        return {}, {ROPE_FREQS: _divisors(config, rope)}
    if kind == "longrope" and _has(library, architecture, "ROPE_FACTORS_LONG"):
        return _long(config, rope)
    raise UnsupportedError(
        f"config.json: rope_type '{kind}' can't be written to a GGUF file of architecture '{architecture}'"
    )


def _has(library: Any, architecture: str, tensor: str) -> bool:
    number = {name: number for number, name in library.MODEL_ARCH_NAMES.items()}[architecture]
    return library.MODEL_TENSOR[tensor] in library.MODEL_TENSORS[number]


def _original(config: HFConfig, rope: dict[str, Any]) -> int:
    return int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)


def _yarn(config: HFConfig, rope: dict[str, Any], architecture: str) -> dict[str, Any]:
    original = _original(config, rope)
    keys: dict[str, Any] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope.get("factor") or config.max_position_embeddings / original),
        "rope.scaling.original_context_length": original,
    }
    for name in ("beta_fast", "beta_slow"):
        if rope.get(name):
            keys[f"rope.scaling.yarn_{name}"] = float(rope[name])
    if architecture in LOG_MULTIPLIERS and rope.get("mscale_all_dim"):
        keys["rope.scaling.yarn_log_multiplier"] = float(rope["mscale_all_dim"]) / LOG_MULTIPLIERS[architecture]
    if rope.get("llama_4_scaling_beta"):
        keys["attention.temperature_scale"] = float(rope["llama_4_scaling_beta"])
    return keys


def _divisors(config: HFConfig, rope: dict[str, Any]) -> Tensor:
    """What each frequency is divided by: [H_rot / 2]."""
    borders = (float(rope["low_freq_factor"]), float(rope["high_freq_factor"]))
    original = _original(config, rope)
    if original != LLAMA3_ORIGINAL or borders not in LLAMA3_BORDERS:
        raise UnsupportedError(
            f"config.json: rope scaling 'llama3' with original_max_position_embeddings: {original} and the factors "
            f"{borders} can't be written to a GGUF file; with {LLAMA3_ORIGINAL} and {LLAMA3_BORDERS} it can"
        )
    sizes = {"head_dim": config.head_dim, "max_position_embeddings": config.max_position_embeddings}
    stretched = build_rotary(rope, **sizes).inv_freq.double()
    plain = build_rotary({**rope, "rope_type": "default"}, **sizes).inv_freq.double()
    return (plain / stretched).float()


def _long(config: HFConfig, rope: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    original = _original(config, rope)
    keys: dict[str, Any] = {"rope.scaling.original_context_length": original}
    factor = rope.get("factor") or config.max_position_embeddings / original
    attention = rope.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    keys["rope.scaling.attn_factor"] = float(attention)
    tensors = {ROPE_LONG: rope["long_factor"], ROPE_SHORT: rope["short_factor"]}
    return keys, {name: torch.tensor(values, dtype=torch.float32) for name, values in tensors.items()}
