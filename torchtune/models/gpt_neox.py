"""GPT-NeoX: attention and feed-forward side by side, each with its norm; a quarter of each head turned.

Queries, keys and values lie in one matrix, head by head. Spec: arXiv:2204.06745, arXiv:2304.01373 (Pythia).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from torchtune.models.config import HFConfig
from torchtune.models.from_config import activation_from, attention_from, decoder_from, rotary_from
from torchtune.modules.decoder import CausalLM
from torchtune.modules.feed_forward import PlainFeedForward
from torchtune.modules.layers import DecoderLayer, ParallelLayer
from torchtune.modules.norms import LayerNorm

COVERS = "Pythia, GPT-NeoX 20B, Dolly 2"
DEFAULTS = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "attention_bias": True,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10_000.0,
}
NAMES = {
    "model": "gpt_neox",
    "embed_tokens": "embed_in",
    "norm": "final_layer_norm",
    "self_attn": "attention",
    "qkv_proj": "query_key_value",
    "o_proj": "dense",
    "up_proj": "dense_h_to_4h",
    "down_proj": "dense_4h_to_h",
}
HEADS: tuple[dict[str, str], ...] = ({"lm_head.": "embed_out."}, {})


def build(values: Mapping[str, Any]) -> CausalLM:
    """A GPT-NeoX from its config.json."""
    known = {**DEFAULTS, **values}
    ours = {"rope_theta": known["rotary_emb_base"], "partial_rotary_factor": known["rotary_pct"]}
    # Every head has its key, and all of them fill the hidden size.
    config = HFConfig({**known, **ours, "head_dim": None, "num_key_value_heads": None})
    config.leave_off_dropout("hidden_dropout")

    def norm() -> LayerNorm:
        return LayerNorm(config.hidden_size, config.layer_norm_eps)

    def layer(index: int) -> nn.Module:
        kind = ParallelLayer if config.use_parallel_residual else DecoderLayer
        return kind(
            attention_from(config, bias=bool(config.attention_bias), fused="by_head"),
            PlainFeedForward(config.hidden_size, config.intermediate_size, activation=activation_from(config)),
            input_layernorm=norm(),
            post_attention_layernorm=norm(),
        )

    return decoder_from(config, layer, rotary_from(config), norm=norm(), names=NAMES, prefix_choices=HEADS)
