"""Qwen3: Llama's layer with a norm on each query and key head.

Spec: arXiv:2505.09388. Parity: tests/models/test_parity.py. Checkpoint names are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torchtune.models import qwen2
from torchtune.models.config import HFConfig
from torchtune.models.llama_kind import build_llama_kind
from torchtune.modules.decoder import CausalLM
from torchtune.modules.norms import RMSNorm

DEFAULTS = {**qwen2.DEFAULTS, "head_dim": 128, "attention_bias": False}


def build(values: Mapping[str, Any]) -> CausalLM:
    """A Qwen3 from its config.json."""
    config = HFConfig(values, DEFAULTS)
    bias = bool(config.attention_bias)
    qk_norm = partial(RMSNorm, config.head_dim, config.rms_norm_eps)
    return build_llama_kind(
        config, qkv_bias=bias, output_bias=bias, qk_norm=qk_norm, windows=qwen2.qwen_windows(config)
    )
