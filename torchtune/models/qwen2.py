"""Qwen2 and Qwen2.5: Llama's layer with biases on queries, keys and values, and windows on the upper layers.

Spec: arXiv:2407.10671. Parity: tests/models/test_parity.py. Checkpoint names are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchtune.models.config import HFConfig, layer_windows
from torchtune.models.llama_kind import build_llama_kind
from torchtune.modules.decoder import CausalLM

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def qwen_windows(config: HFConfig) -> list[int | None]:
    """Windows of Qwen models: none unless `use_sliding_window`, then from layer `max_window_layers` on."""
    if not config.use_sliding_window:
        return [None] * config.num_hidden_layers
    if config.get("layer_types") is not None:
        return layer_windows(config)
    first = config.max_window_layers
    return [config.sliding_window if index >= first else None for index in range(config.num_hidden_layers)]


def build(values: Mapping[str, Any]) -> CausalLM:
    """A Qwen2 from its config.json."""
    config = HFConfig(values, DEFAULTS)
    return build_llama_kind(config, qkv_bias=True, output_bias=False, windows=qwen_windows(config))
