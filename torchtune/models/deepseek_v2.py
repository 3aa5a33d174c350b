"""DeepSeek V2 and V2 Lite: V3's attention, and experts by a softmax, within groups or among all.

Spec: arXiv:2405.04434.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from torchtune.models.config import HFConfig
from torchtune.models.deepseek_v3 import attention, with_shared_experts
from torchtune.models.from_config import decoder_from, feed_forward_from, norms_from, rotary_from
from torchtune.models.mixtures import router_from
from torchtune.modules.decoder import CausalLM
from torchtune.modules.layers import DecoderLayer
from torchtune.modules.moe import choose_by_groups

COVERS = "DeepSeek V2, V2 Lite, Coder V2"
DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "moe_intermediate_size": 1407,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 0,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


def build(values: Mapping[str, Any]) -> CausalLM:
    """A DeepSeek V2 from its config.json."""
    config = HFConfig(values, DEFAULTS)
    config.refuse("scoring_func", ("softmax",))
    config.refuse("topk_method", ("greedy", "group_limited_greedy"))
    config.refuse("moe_layer_freq", (1,))
    # transformers' V2 and DeepSeek's own code differ here, and no released checkpoint asks for it.
    config.refuse("norm_topk_prob", (False,))
    by_group = config.topk_method == "group_limited_greedy"
    # Among all is among the one best group of one.
    num_groups, top_groups = (config.n_group, config.topk_group) if by_group else (1, 1)
    choose = partial(
        choose_by_groups,
        top_k=config.num_experts_per_tok,
        num_groups=num_groups,
        top_groups=top_groups,
        scale=config.routed_scaling_factor,
    )

    def mlp(index: int) -> nn.Module:
        if index < config.first_k_dense_replace:
            return feed_forward_from(config, bias=bool(config.mlp_bias))
        return with_shared_experts(config, router_from(config, choose))

    def layer(index: int) -> DecoderLayer:
        return DecoderLayer(
            attention(config), mlp(index), **norms_from(config, "input_layernorm", "post_attention_layernorm")
        )

    rotary = rotary_from(config, head_dim=config.qk_rope_head_dim, interleaved=True)
    return decoder_from(config, layer, rotary)
