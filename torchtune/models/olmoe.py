"""OLMoE: Llama's layer with norms over all queries and all keys, and many small experts.

Spec: arXiv:2409.02060.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchtune.models.config import HFConfig
from torchtune.models.from_config import attention_from, decoder_from, norms_from, rotary_from
from torchtune.models.mixtures import GATE_UP_DOWN, experts_from, router_from, router_loss_from
from torchtune.modules.decoder import CausalLM
from torchtune.modules.layers import DecoderLayer
from torchtune.modules.moe import MoE
from torchtune.modules.norms import RMSNorm

COVERS = "OLMoE 1B-7B"
DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "clip_qkv": None,
    "intermediate_size": 2048,
    "num_experts_per_tok": 8,
    "num_experts": 64,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.01,
}


def build(values: Mapping[str, Any]) -> CausalLM:
    """An OLMoE from its config.json."""
    config = HFConfig(values, DEFAULTS)

    def layer(index: int) -> DecoderLayer:
        attention = attention_from(
            config,
            bias=bool(config.attention_bias),
            q_norm=RMSNorm(config.num_attention_heads * config.head_dim, config.rms_norm_eps),
            k_norm=RMSNorm(config.num_key_value_heads * config.head_dim, config.rms_norm_eps),
            norm_at="flat",
            clip=config.clip_qkv,
        )
        experts = experts_from(config, config.intermediate_size, separate=GATE_UP_DOWN)
        return DecoderLayer(
            attention,
            MoE(router_from(config), experts),
            **norms_from(config, "input_layernorm", "post_attention_layernorm"),
        )

    return decoder_from(config, layer, rotary_from(config), router_loss=router_loss_from(config))
