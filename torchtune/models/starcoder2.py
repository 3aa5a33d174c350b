"""StarCoder2: layer norms, a feed-forward without a gate, biases everywhere, a window in every layer.

Spec: arXiv:2402.19173.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchtune.models.config import HFConfig, layer_windows
from torchtune.models.from_config import activation_from, attention_from, decoder_from, rotary_from
from torchtune.modules.decoder import CausalLM
from torchtune.modules.feed_forward import PlainFeedForward
from torchtune.modules.layers import DecoderLayer
from torchtune.modules.norms import LayerNorm

COVERS = "StarCoder2"
NAMES = {"up_proj": "c_fc", "down_proj": "c_proj"}
DEFAULTS = {
    "hidden_act": "gelu_pytorch_tanh",
    "norm_epsilon": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "num_key_value_heads": 2,
    "use_bias": True,
}


def build(values: Mapping[str, Any]) -> CausalLM:
    """A StarCoder2 from its config.json."""
    config = HFConfig(values, DEFAULTS)
    config.leave_off_dropout("residual_dropout", "embedding_dropout")
    windows = layer_windows(config)
    bias = bool(config.use_bias)

    def norm() -> LayerNorm:
        return LayerNorm(config.hidden_size, config.norm_epsilon)

    def layer(index: int) -> DecoderLayer:
        return DecoderLayer(
            attention_from(config, bias=bias, window=windows[index]),
            PlainFeedForward(
                config.hidden_size, config.intermediate_size, activation=activation_from(config), bias=bias
            ),
            input_layernorm=norm(),
            post_attention_layernorm=norm(),
        )

    return decoder_from(config, layer, rotary_from(config), norm=norm(), names=NAMES)
