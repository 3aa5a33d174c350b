"""Cohere: attention and feed-forward side by side on one norm, without biases, pairs of neighbours turned.

Spec: the config and weights of Command R.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchtune.models.config import HFConfig
from torchtune.models.from_config import attention_from, decoder_from, feed_forward_from, rotary_from
from torchtune.modules.decoder import CausalLM
from torchtune.modules.layers import ParallelLayer
from torchtune.modules.norms import LayerNorm

COVERS = "Command R, R+; Aya 23, Expanse"
DEFAULTS = {
    "hidden_act": "silu",
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "use_qk_norm": False,
    "logit_scale": 0.0625,
    "rope_theta": 500_000.0,
}


def build(values: Mapping[str, Any]) -> CausalLM:
    """A Cohere from its config.json."""
    config = HFConfig(values, DEFAULTS)
    return cohere_from(config, [None] * config.num_hidden_layers, [True] * config.num_hidden_layers)


def cohere_from(config: HFConfig, windows: Sequence[int | None], turned: Sequence[bool]) -> CausalLM:
    """A Cohere of either generation.

    Args:
        windows: of each layer.
        turned: whether each layer knows positions.
    """

    def norm(*size: int) -> LayerNorm:
        return LayerNorm(size if len(size) > 1 else size[0], config.layer_norm_eps, bias=False)

    def norms_of_heads() -> dict[str, Any]:
        if not config.use_qk_norm:
            return {}
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        return {"q_norm": norm(heads, config.head_dim), "k_norm": norm(kv_heads, config.head_dim)}

    def layer(index: int) -> ParallelLayer:
        return ParallelLayer(
            attention_from(config, bias=bool(config.attention_bias), window=windows[index], **norms_of_heads()),
            feed_forward_from(config),
            input_layernorm=norm(config.hidden_size),
        )

    rotary = rotary_from(config, interleaved=True)
    return decoder_from(
        config,
        layer,
        [rotary if is_turned else None for is_turned in turned],
        norm=norm(config.hidden_size),
        logit_scale=config.logit_scale,
    )
