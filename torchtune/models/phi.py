"""Phi: attention and feed-forward side by side on one norm, biases everywhere, on the head too.

Spec: arXiv:2306.11644, arXiv:2309.05463.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchtune.models.config import HFConfig
from torchtune.models.from_config import activation_from, attention_from, decoder_from, rotary_from
from torchtune.modules.decoder import CausalLM
from torchtune.modules.feed_forward import PlainFeedForward
from torchtune.modules.layers import ParallelLayer
from torchtune.modules.norms import LayerNorm

COVERS = "Phi-1, Phi-1.5, Phi-2"
DEFAULTS = {
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "qk_layernorm": False,
    "partial_rotary_factor": 0.5,
}
NAMES = {
    "norm": "final_layernorm",
    "o_proj": "dense",
    "q_norm": "q_layernorm",
    "k_norm": "k_layernorm",
    "up_proj": "fc1",
    "down_proj": "fc2",
}


def build(values: Mapping[str, Any]) -> CausalLM:
    """A Phi from its config.json."""
    config = HFConfig(values, DEFAULTS)
    config.refuse("tie_word_embeddings", (False,))  # a tied head would own a bias alone
    config.leave_off_dropout("resid_pdrop", "embd_pdrop")

    def norm(size: int) -> LayerNorm:
        return LayerNorm(size, config.layer_norm_eps)

    def layer(index: int) -> ParallelLayer:
        norms: dict[str, Any] = {name: norm(config.head_dim) for name in ("q_norm", "k_norm") if config.qk_layernorm}
        return ParallelLayer(
            attention_from(config, bias=True, **norms),
            PlainFeedForward(config.hidden_size, config.intermediate_size, activation=activation_from(config)),
            input_layernorm=norm(config.hidden_size),
        )

    return decoder_from(config, layer, rotary_from(config), norm=norm(config.hidden_size), names=NAMES, head_bias=True)
