"""GLM: Llama's layer with half of each head turned, pairs of neighbours, and gate and up in one matrix.

Spec: arXiv:2406.12793.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchtune.models.config import HFConfig
from torchtune.models.from_config import attention_from, decoder_from, feed_forward_from, norms_from, rotary_from
from torchtune.modules.attention import Attention
from torchtune.modules.decoder import CausalLM
from torchtune.modules.layers import DecoderLayer

COVERS = "GLM-4 9B, GLM-Edge"
DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1.5625e-07,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": False,
    "head_dim": 128,
    "num_key_value_heads": 2,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
}


def attention(config: HFConfig) -> Attention:
    """GLM's attention, in both generations."""
    return attention_from(config, qkv_bias=bool(config.attention_bias))


def build(values: Mapping[str, Any]) -> CausalLM:
    """A GLM from its config.json."""
    config = HFConfig(values, DEFAULTS)

    def layer(index: int) -> DecoderLayer:
        return DecoderLayer(
            attention(config),
            feed_forward_from(config, fused=True),
            **norms_from(config, "input_layernorm", "post_attention_layernorm"),
        )

    return decoder_from(config, layer, rotary_from(config, interleaved=True))
