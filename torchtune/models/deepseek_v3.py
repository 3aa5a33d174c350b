"""DeepSeek V3 and R1: latent attention, and experts chosen by group with a bias that balances them.

Spec: arXiv:2412.19437. The layers beyond `num_hidden_layers`, which predict more tokens, are carried unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from torchtune.models.config import HFConfig
from torchtune.models.from_config import decoder_from, feed_forward_from, norms_from, rotary_from
from torchtune.models.mixtures import GATE_UP_DOWN, experts_from, router_from
from torchtune.modules.attend import Scores
from torchtune.modules.decoder import CausalLM
from torchtune.modules.layers import DecoderLayer
from torchtune.modules.mla import LatentAttention
from torchtune.modules.moe import MoE, Router, choose_by_biased_groups

COVERS = "DeepSeek V3, R1; Moonlight"
DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_interleave": True,
}


def build(values: Mapping[str, Any]) -> CausalLM:
    """A DeepSeek V3 from its config.json."""
    config = HFConfig(values, DEFAULTS)
    config.refuse("scoring_func", ("sigmoid",))
    config.refuse("topk_method", ("noaux_tc",))
    config.refuse("moe_layer_freq", (1,))

    def mlp(index: int) -> nn.Module:
        if index < config.first_k_dense_replace:
            return feed_forward_from(config)
        return with_shared_experts(config, balanced_router(config))

    def layer(index: int) -> DecoderLayer:
        return DecoderLayer(
            attention(config), mlp(index), **norms_from(config, "input_layernorm", "post_attention_layernorm")
        )

    rotary = rotary_from(config, head_dim=config.qk_rope_head_dim, interleaved=bool(config.rope_interleave))
    return decoder_from(config, layer, rotary, carried=[extra_layers(config)])


def attention(config: HFConfig) -> LatentAttention:
    """DeepSeek's attention, since V2."""
    return LatentAttention(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        scores=Scores(attention_scale(config)),
        query_rank=config.q_lora_rank,
        kv_rank=config.kv_lora_rank,
        plain_dim=config.qk_nope_head_dim,
        rotated_dim=config.qk_rope_head_dim,
        value_dim=config.v_head_dim,
        bias=bool(config.attention_bias),
    )


def attention_scale(config: HFConfig) -> float:
    """1 / sqrt(head size), raised where yarn stretches the context (`mscale_all_dim`)."""
    scale = float((config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5)
    rope = config.rope_parameters
    mscale = rope.get("mscale_all_dim")
    if rope["rope_type"] == "default" or not mscale or rope["factor"] <= 1:
        return scale
    return scale * float(0.1 * mscale * math.log(rope["factor"]) + 1.0) ** 2


def balanced_router(config: HFConfig) -> Router:
    """A router by groups, with the bias that keeps the load of experts even."""
    choose = partial(
        choose_by_biased_groups,
        top_k=config.num_experts_per_tok,
        num_groups=config.n_group,
        top_groups=config.topk_group,
        normalised=bool(config.norm_topk_prob),
        scale=config.routed_scaling_factor,
    )
    return router_from(config, choose, has_correction=True)


def with_shared_experts(config: HFConfig, router: Router) -> MoE:
    """Experts behind `router`, and beside them `n_shared_experts` that every token goes through, as one block."""
    experts = experts_from(config, config.moe_intermediate_size, separate=GATE_UP_DOWN)
    size = config.moe_intermediate_size * config.n_shared_experts
    shared = feed_forward_from(config, intermediate_size=size, bias=bool(config.get("mlp_bias")))
    return MoE(router, experts, shared_experts=shared)


def extra_layers(config: HFConfig) -> str:
    """A pattern of the tensors of layers beyond the last, which predict further tokens in pre-training."""
    first = config.num_hidden_layers
    extra = config.get("num_nextn_predict_layers") or 1
    return rf"^model\.layers\.({'|'.join(str(index) for index in range(first, first + extra))})\."
