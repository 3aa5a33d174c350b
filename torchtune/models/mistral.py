"""Mistral: Llama's layer with a sliding window in every layer, where the config has one.

Spec: arXiv:2310.06825. Parity: tests/models/test_parity.py. Checkpoint names are ours.
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
    "max_position_embeddings": 4096 * 32,
    "tie_word_embeddings": False,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}


def build(values: Mapping[str, Any]) -> CausalLM:
    """A Mistral from its config.json."""
    config = HFConfig(values, DEFAULTS)
    return build_llama_kind(config, qkv_bias=False, output_bias=False, windows=layer_windows(config))
