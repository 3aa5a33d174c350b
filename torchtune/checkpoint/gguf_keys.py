"""What the metadata and tensors of nearly every GGUF architecture say, as keys of a config.json."""

from __future__ import annotations

from typing import Any

import numpy as np

from torchtune.checkpoint.gguf import GGUFHeader
from torchtune.errors import CheckpointError, UnsupportedError

Config = dict[str, Any]


def decimal(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05, where the file holds 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def number(file: GGUFHeader, key: str, default: int | None = None) -> int:
    """A whole number; given by layer, it is the same for all.

    Raises:
        UnsupportedError: it differs from layer to layer.
    """
    value = file.need(key) if default is None else file.get(key, default)
    values = set(value) if isinstance(value, list) else {value}
    if len(values) != 1:
        raise UnsupportedError(f"{file.path}: {file.architecture}.{key} differs from layer to layer: {value}")
    return int(values.pop())


def has(file: GGUFHeader, name: str) -> bool:
    """Whether any layer has a tensor of this name."""
    return any(tensor.endswith(f".{name}") for tensor in file.tensors)


def shape(file: GGUFHeader, name: str) -> tuple[int, ...]:
    """The shape of a tensor of a layer that has it.

    Raises:
        CheckpointError: none has.
    """
    for tensor in file.tensors.values():
        if tensor.name.endswith(f".{name}") or tensor.name == name:
            return tensor.shape
    raise CheckpointError(f"has no tensor '{name}'", path=file.path)


def common(file: GGUFHeader, model_type: str, model_class: str, *, eps: str = "rms_norm_eps") -> Config:
    """What nearly all have; the name of the norm's epsilon says which kind of norm it is, too."""
    kind = "_rms" if eps.startswith("rms") else ""
    hidden_size, num_heads = number(file, "embedding_length"), number(file, "attention.head_count")
    config: Config = {
        "architectures": [model_class],
        "model_type": model_type,
        "vocab_size": shape(file, "token_embd.weight")[0],
        "hidden_size": hidden_size,
        "intermediate_size": number(file, "feed_forward_length"),
        "num_hidden_layers": number(file, "block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": number(file, "attention.head_count_kv", num_heads),
        "head_dim": number(file, "attention.key_length", hidden_size // num_heads),
        "hidden_act": "silu",
        "max_position_embeddings": number(file, "context_length"),
        eps: decimal(file.need(f"attention.layer_norm{kind}_epsilon")),
        "rope_theta": decimal(file.get("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if file.get("attention.value_length", config["head_dim"]) != config["head_dim"]:
        raise UnsupportedError(f"{file.path}: keys and values of different lengths are not supported here")
    return config


def partial_rotary(file: GGUFHeader, config: Config) -> float:
    """The share of a head that is rotated."""
    return float(file.get("rope.dimension_count", config["head_dim"])) / float(config["head_dim"])


def windows(file: GGUFHeader, config: Config, *, every: int) -> Config:
    """A window on all layers but each `every`-th, unless the file has a pattern of its own."""
    pattern = file.get("attention.sliding_window_pattern", every)
    num_layers = config["num_hidden_layers"]
    if isinstance(pattern, list):
        windowed = [bool(value) for value in pattern[:num_layers]]
    else:
        windowed = [(layer + 1) % int(pattern) != 0 for layer in range(num_layers)]
    return {
        "sliding_window": number(file, "attention.sliding_window"),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windowed],
    }


def biases(file: GGUFHeader) -> Config:
    """Which linear layers have them, as Llama says it."""
    return {"attention_bias": has(file, "attn_q.bias"), "mlp_bias": has(file, "ffn_up.bias")}


def soft_cap(file: GGUFHeader, key: str) -> float | None:
    """A cap of logits; none where it is zero or absent."""
    value = file.get(key)
    return decimal(value) if value else None
