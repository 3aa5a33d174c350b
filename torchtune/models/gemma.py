"""Gemma: Llama's layer with norms that are stored as their distance from one, scaled embeddings and a GELU gate.

Spec: arXiv:2403.08295.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchtune.models.config import HFConfig
from torchtune.models.from_config import attention_from, decoder_from, feed_forward_from, norms_from, rotary_from
from torchtune.modules.decoder import CausalLM
from torchtune.modules.layers import DecoderLayer
from torchtune.modules.norms import RMSNorm

COVERS = "Gemma 1, 1.1; CodeGemma"
DEFAULTS = {
    "hidden_act": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "head_dim": 256,
    "num_key_value_heads": 16,
    "attention_bias": False,
}


def build(values: Mapping[str, Any]) -> CausalLM:
    """A Gemma from its config.json."""
    if values.get("hidden_act") == "gelu":
        # The first releases say so and were trained with its tanh form.
        values = {**values, "hidden_act": "gelu_pytorch_tanh"}
    config = HFConfig(values, DEFAULTS)
    config.refuse("use_bidirectional_attention", (None, False))

    def layer(index: int) -> DecoderLayer:
        return DecoderLayer(
            attention_from(config, bias=bool(config.attention_bias)),
            feed_forward_from(config),
            **norms_from(config, "input_layernorm", "post_attention_layernorm", from_one=True),
        )

    return decoder_from(
        config,
        layer,
        rotary_from(config),
        norm=RMSNorm(config.hidden_size, config.rms_norm_eps, from_one=True),
        decoder={"embedding_scale": config.hidden_size**0.5},
    )
