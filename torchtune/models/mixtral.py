"""Mixtral: Mistral's layer with a mixture of experts in place of the feed-forward.

Spec: arXiv:2401.04088. Checkpoints call an expert's gate, up and down w1, w3 and w2.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torchtune.models.config import HFConfig
from torchtune.models.from_config import attention_from, decoder_from, norms_from, rotary_from
from torchtune.models.mixtures import experts_from, router_from, router_loss_from
from torchtune.modules.decoder import CausalLM
from torchtune.modules.layers import DecoderLayer
from torchtune.modules.moe import MoE, softmax_then_choose

COVERS = "Mixtral 8x7B, 8x22B"
DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096 * 32,
    "tie_word_embeddings": False,
    "rope_theta": 1_000_000.0,
    "num_key_value_heads": 8,
    "sliding_window": None,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.001,
}
NAMES = {"mlp": "block_sparse_moe"}


def build(values: Mapping[str, Any]) -> CausalLM:
    """A Mixtral from its config.json."""
    config = HFConfig(values, DEFAULTS)
    config.leave_off_dropout("router_jitter_noise")
    choose = partial(softmax_then_choose, top_k=config.num_experts_per_tok, normalised=True)

    def layer(index: int) -> DecoderLayer:
        experts = experts_from(config, config.intermediate_size, separate=("w1", "w3", "w2"))
        return DecoderLayer(
            attention_from(config, window=config.sliding_window),
            MoE(router_from(config, choose), experts),
            **norms_from(config, "input_layernorm", "post_attention_layernorm"),
        )

    model = decoder_from(config, layer, rotary_from(config), names=NAMES, router_loss=router_loss_from(config))
    model.names_in_transformers = {".block_sparse_moe": ".mlp"}
    return model
