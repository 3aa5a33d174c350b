"""Llama 2, 3, 3.1, 3.2, 3.3, and what calls itself so: SmolLM2, Falcon 3 and many more.

Spec: arXiv:2307.09288, arXiv:2407.21783.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchtune.models.config import HFConfig
from torchtune.models.from_config import attention_from, decoder_from, feed_forward_from, norms_from, rotary_from
from torchtune.modules.decoder import CausalLM
from torchtune.modules.layers import DecoderLayer

COVERS = "Llama 2, 3, 3.1, 3.2, 3.3; SmolLM2; Falcon 3; Yi; TinyLlama"
DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


def build(values: Mapping[str, Any]) -> CausalLM:
    """A Llama from its config.json."""
    config = HFConfig(values, DEFAULTS)
    config.refuse("pretraining_tp", (1, None))

    def layer(index: int) -> DecoderLayer:
        return DecoderLayer(
            attention_from(config, bias=bool(config.attention_bias)),
            feed_forward_from(config, bias=bool(config.mlp_bias)),
            **norms_from(config, "input_layernorm", "post_attention_layernorm"),
        )

    return decoder_from(config, layer, rotary_from(config))
