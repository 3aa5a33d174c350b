"""Granite: Llama's layer with four multipliers: of embeddings, scores, residuals and logits.

Spec: the configs and weights of Granite 3; multipliers as in arXiv:2408.13359.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchtune.models.config import HFConfig
from torchtune.models.from_config import attention_from, decoder_from, feed_forward_from, norms_from, rotary_from
from torchtune.modules.decoder import CausalLM
from torchtune.modules.layers import DecoderLayer

COVERS = "Granite 3.0 to 3.3 (dense)"
DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}


def build(values: Mapping[str, Any]) -> CausalLM:
    """A dense Granite from its config.json."""
    config = HFConfig(values, DEFAULTS)

    def layer(index: int) -> DecoderLayer:
        return DecoderLayer(
            attention_from(config, bias=bool(config.attention_bias), scale=config.attention_multiplier),
            feed_forward_from(config, bias=bool(config.mlp_bias)),
            residual_scale=config.residual_multiplier,
            **norms_from(config, "input_layernorm", "post_attention_layernorm"),
        )

    return decoder_from(
        config,
        layer,
        rotary_from(config),
        decoder={"embedding_scale": config.embedding_multiplier},
        logit_scale=1 / config.logits_scaling,
    )
