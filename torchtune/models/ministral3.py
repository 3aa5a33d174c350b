"""Ministral 3: Mistral's layer, with queries that grow with the logarithm of their position.

Spec: the configs and weights of Ministral 3; scaled queries as in Llama 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchtune.models.config import HFConfig
from torchtune.models.from_config import attention_from, decoder_from, feed_forward_from, norms_from, rotary_from
from torchtune.modules.decoder import CausalLM
from torchtune.modules.layers import DecoderLayer

COVERS = "Ministral 3 (3B, 8B, 14B; text)"
DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 262_144,
    "tie_word_embeddings": False,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "sliding_window": None,
}
ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def build(values: Mapping[str, Any], **options: Any) -> CausalLM:
    """A Ministral 3 from its config.json; `options` are those of `CausalLM`."""
    config = HFConfig(values, DEFAULTS)
    has_rope = config.get("rope_parameters") or config.get("rope_scaling")
    rope = config.rope_parameters if has_rope else ROPE

    def layer(index: int) -> DecoderLayer:
        return DecoderLayer(
            attention_from(config, window=config.sliding_window, query_scale=_query_scale(config, rope)),
            feed_forward_from(config),
            **norms_from(config, "input_layernorm", "post_attention_layernorm"),
        )

    return decoder_from(config, layer, rotary_from(config, rope), **options)


def _query_scale(config: HFConfig, rope: Mapping[str, Any]) -> Callable[[Tensor], Tensor] | None:
    """1 + beta log(1 + floor(position / original context)), so that nothing changes within that context."""
    beta = rope.get("llama_4_scaling_beta")
    if beta is None:
        return None
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    return lambda positions: 1 + beta * torch.log(1 + torch.floor(positions / original))
