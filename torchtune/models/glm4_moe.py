"""GLM-4.5 and 4.6: grouped-query attention with part of each head rotated, and DeepSeek V3's experts.

Spec: arXiv:2508.06471. The layer beyond the last, which predicts a further token, is carried unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from torchtune.models.config import HFConfig
from torchtune.models.deepseek_v3 import balanced_router, extra_layers, with_shared_experts
from torchtune.models.from_config import attention_from, decoder_from, feed_forward_from, norms_from, rotary_from
from torchtune.modules.decoder import CausalLM
from torchtune.modules.layers import DecoderLayer
from torchtune.modules.norms import RMSNorm

COVERS = "GLM-4.5, 4.5 Air, 4.6"
DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": False,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 0.5,
    "attention_bias": False,
    "use_qk_norm": False,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
}


def build(values: Mapping[str, Any]) -> CausalLM:
    """A GLM-4.5 from its config.json."""
    config = HFConfig(values, DEFAULTS)

    def head_norm() -> nn.Module | None:
        return RMSNorm(config.head_dim, config.rms_norm_eps) if config.use_qk_norm else None

    def layer(index: int) -> DecoderLayer:
        is_dense = index < config.first_k_dense_replace
        return DecoderLayer(
            attention_from(config, qkv_bias=bool(config.attention_bias), q_norm=head_norm(), k_norm=head_norm()),
            feed_forward_from(config) if is_dense else with_shared_experts(config, balanced_router(config)),
            **norms_from(config, "input_layernorm", "post_attention_layernorm"),
        )

    return decoder_from(config, layer, rotary_from(config), carried=[extra_layers(config)])
