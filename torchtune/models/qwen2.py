"""Qwen2 and Qwen2.5: Llama's layer with biases on queries, keys and values, and windows on the upper layers.

Spec: arXiv:2407.10671.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchtune.models.config import HFConfig, layer_windows
from torchtune.models.from_config import attention_from, decoder_from, feed_forward_from, norms_from, rotary_from
from torchtune.modules.decoder import CausalLM
from torchtune.modules.layers import DecoderLayer

COVERS = "Qwen2, Qwen2.5, QwQ"
DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def qwen_windows(config: HFConfig) -> list[int | None]:
    """Windows of Qwen models: none unless `use_sliding_window`, then from layer `max_window_layers` on."""
    if not config.use_sliding_window:
        return [None] * config.num_hidden_layers
    if config.get("layer_types") is not None:
        return layer_windows(config)
    first = config.max_window_layers
    return [config.sliding_window if index >= first else None for index in range(config.num_hidden_layers)]


def build(values: Mapping[str, Any]) -> CausalLM:
    """A Qwen2 from its config.json."""
    config = HFConfig(values, DEFAULTS)
    windows = qwen_windows(config)

    def layer(index: int) -> DecoderLayer:
        return DecoderLayer(
            attention_from(config, qkv_bias=True, window=windows[index]),
            feed_forward_from(config),
            **norms_from(config, "input_layernorm", "post_attention_layernorm"),
        )

    return decoder_from(config, layer, rotary_from(config))
