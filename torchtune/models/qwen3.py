"""Qwen3: Llama's layer with a norm on each query and key head.

Spec: arXiv:2505.09388.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchtune.models import qwen2
from torchtune.models.config import HFConfig
from torchtune.models.from_config import attention_from, decoder_from, feed_forward_from, norms_from, rotary_from
from torchtune.modules.attention import Attention
from torchtune.modules.decoder import CausalLM
from torchtune.modules.layers import DecoderLayer
from torchtune.modules.norms import RMSNorm

COVERS = "Qwen3 (dense)"
DEFAULTS = {**qwen2.DEFAULTS, "head_dim": 128, "attention_bias": False}


def attention(config: HFConfig, window: int | None) -> Attention:
    """Qwen3's attention, its mixture of experts' too."""
    return attention_from(
        config,
        bias=bool(config.attention_bias),
        q_norm=RMSNorm(config.head_dim, config.rms_norm_eps),
        k_norm=RMSNorm(config.head_dim, config.rms_norm_eps),
        window=window,
    )


def build(values: Mapping[str, Any]) -> CausalLM:
    """A Qwen3 from its config.json."""
    config = HFConfig(values, DEFAULTS)
    windows = qwen2.qwen_windows(config)

    def layer(index: int) -> DecoderLayer:
        return DecoderLayer(
            attention(config, windows[index]),
            feed_forward_from(config),
            **norms_from(config, "input_layernorm", "post_attention_layernorm"),
        )

    return decoder_from(config, layer, rotary_from(config))
