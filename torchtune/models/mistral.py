"""Mistral: Llama's layer with a sliding window in every layer, where the config has one.

Spec: arXiv:2310.06825.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchtune.models.config import HFConfig, layer_windows
from torchtune.models.from_config import attention_from, decoder_from, feed_forward_from, norms_from, rotary_from
from torchtune.modules.decoder import CausalLM
from torchtune.modules.layers import DecoderLayer

COVERS = "Mistral 7B, Nemo, Small (text)"
DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096 * 32,
    "tie_word_embeddings": False,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}


def build(values: Mapping[str, Any], **options: Any) -> CausalLM:
    """A Mistral from its config.json; `options` are those of `CausalLM`."""
    config = HFConfig(values, DEFAULTS)
    windows = layer_windows(config)

    def layer(index: int) -> DecoderLayer:
        return DecoderLayer(
            attention_from(config, window=windows[index]),
            feed_forward_from(config),
            **norms_from(config, "input_layernorm", "post_attention_layernorm"),
        )

    return decoder_from(config, layer, rotary_from(config), **options)
