"""OLMo 2: norms after attention and feed-forward instead of before, and over all heads of queries and keys at once.

Spec: arXiv:2501.00656.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchtune.models.config import HFConfig
from torchtune.models.from_config import attention_from, decoder_from, feed_forward_from, norms_from, rotary_from
from torchtune.modules.decoder import CausalLM
from torchtune.modules.layers import PostNormLayer
from torchtune.modules.norms import RMSNorm
from torchtune.modules.rotary import RotaryEmbedding

COVERS = "OLMo 2 (1B, 7B, 13B, 32B)"
DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
}


def build(values: Mapping[str, Any]) -> CausalLM:
    """An OLMo 2 from its config.json."""
    config = HFConfig(values, DEFAULTS)
    return olmo_from(config, [None] * config.num_hidden_layers, rotary_from(config))


def olmo_from(
    config: HFConfig, windows: Sequence[int | None], rotary: RotaryEmbedding | Sequence[RotaryEmbedding]
) -> CausalLM:
    """An OLMo of either generation.

    Args:
        windows: of each layer.
        rotary: of all layers, or of each.
    """
    query_size = config.num_attention_heads * config.head_dim
    key_size = config.num_key_value_heads * config.head_dim

    def layer(index: int) -> PostNormLayer:
        attention = attention_from(
            config,
            bias=bool(config.attention_bias),
            window=windows[index],
            q_norm=RMSNorm(query_size, config.rms_norm_eps),
            k_norm=RMSNorm(key_size, config.rms_norm_eps),
            norm_at="flat",
        )
        norms = norms_from(config, "post_attention_layernorm", "post_feedforward_layernorm")
        return PostNormLayer(attention, feed_forward_from(config), **norms)

    return decoder_from(config, layer, rotary)
