"""Llama 2, 3, 3.1, 3.2, and what calls itself so: SmolLM2 and many more.

Spec: arXiv:2307.09288, arXiv:2407.21783. Parity: tests/models/test_parity.py. Checkpoint names are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchtune.models.config import HFConfig
from torchtune.models.llama_kind import build_llama_kind
from torchtune.modules.decoder import CausalLM

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


def build(values: Mapping[str, Any]) -> CausalLM:
    """A Llama from its config.json."""
    config = HFConfig(values, DEFAULTS)
    bias = bool(config.attention_bias)
    return build_llama_kind(config, qkv_bias=bias, output_bias=bias, mlp_bias=bool(config.mlp_bias))
