"""SmolLM3: Llama's layer, every fourth without positions.

Spec: the config and weights of SmolLM3-3B; layers without positions as in arXiv:2501.18795.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchtune.models.config import HFConfig, layer_windows
from torchtune.models.from_config import attention_from, decoder_from, feed_forward_from, norms_from, rotary_from
from torchtune.modules.decoder import CausalLM
from torchtune.modules.layers import DecoderLayer

COVERS = "SmolLM3"
DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "num_key_value_heads": 4,
    "attention_bias": False,
    "mlp_bias": False,
    "no_rope_layer_interval": 4,
    "use_sliding_window": False,
    "rope_theta": 2_000_000.0,
}


def build(values: Mapping[str, Any]) -> CausalLM:
    """A SmolLM3 from its config.json."""
    config = HFConfig(values, DEFAULTS)
    num_layers, interval = config.num_hidden_layers, config.no_rope_layer_interval
    turned = config.get("no_rope_layers")  # 1 where a layer does have positions, whatever the name says
    if turned is None:
        turned = [(index + 1) % interval for index in range(num_layers)]
    if config.get("layer_types") is not None:
        windows = layer_windows(config)
    else:
        window = config.get("sliding_window") if config.use_sliding_window else None
        windows = [None if turned[index] else window for index in range(num_layers)]

    def layer(index: int) -> DecoderLayer:
        return DecoderLayer(
            attention_from(config, bias=bool(config.attention_bias), window=windows[index]),
            feed_forward_from(config, bias=bool(config.mlp_bias)),
            **norms_from(config, "input_layernorm", "post_attention_layernorm"),
        )

    rotary = rotary_from(config)
    return decoder_from(config, layer, [rotary if turned[index] else None for index in range(num_layers)])
