"""Qwen3: Llama's layer with a norm on each query and key head.

Spec: arXiv:2505.09388. Parity: tests/models/test_parity.py. Checkpoint names are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torchtune.models.config import HFConfig
from torchtune.models.llama_kind import build_llama_kind
from torchtune.models.qwen2 import qwen_windows
from torchtune.modules.decoder import CausalLM
from torchtune.modules.norms import RMSNorm

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def build(values: Mapping[str, Any]) -> CausalLM:
    """A Qwen3 from its config.json."""
    config = HFConfig(values, DEFAULTS)
    bias = bool(config.attention_bias)
    qk_norm = partial(RMSNorm, config.head_dim, config.rms_norm_eps)
    return build_llama_kind(config, qkv_bias=bias, output_bias=bias, qk_norm=qk_norm, windows=qwen_windows(config))
