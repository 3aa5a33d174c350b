"""Qwen3's mixture of experts: its attention, and experts in place of most feed-forwards.

Spec: arXiv:2505.09388.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from torchtune.models import qwen3
from torchtune.models.config import HFConfig
from torchtune.models.from_config import decoder_from, feed_forward_from, norms_from, rotary_from
from torchtune.models.mixtures import GATE_UP_DOWN, experts_from, router_from, router_loss_from
from torchtune.modules.decoder import CausalLM
from torchtune.modules.layers import DecoderLayer
from torchtune.modules.moe import MoE

COVERS = "Qwen3 MoE (30B-A3B, 235B-A22B, Coder)"
DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "num_key_value_heads": 4,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}


def build(values: Mapping[str, Any]) -> CausalLM:
    """A Qwen3 mixture of experts from its config.json."""
    config = HFConfig(values, DEFAULTS)
    # Unlike the dense models', all layers or none have a window.
    window = config.sliding_window if config.use_sliding_window else None

    def mlp(index: int) -> nn.Module:
        if not has_experts(config, index):
            return feed_forward_from(config)
        experts = experts_from(config, config.moe_intermediate_size, separate=GATE_UP_DOWN)
        return MoE(router_from(config), experts)

    def layer(index: int) -> DecoderLayer:
        return DecoderLayer(
            qwen3.attention(config, window),
            mlp(index),
            **norms_from(config, "input_layernorm", "post_attention_layernorm"),
        )

    return decoder_from(config, layer, rotary_from(config), router_loss=router_loss_from(config))


def has_experts(config: HFConfig, index: int) -> bool:
    """Whether a layer of a Qwen mixture has experts, or a plain feed-forward."""
    return index not in (config.get("mlp_only_layers") or ()) and (index + 1) % config.decoder_sparse_step == 0
