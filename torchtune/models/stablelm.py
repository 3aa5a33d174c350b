"""StableLM 2: layer norms, a quarter of each head turned, at choice blocks side by side and a norm for each head.

Spec: arXiv:2402.17834.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from torchtune.models.config import HFConfig
from torchtune.models.from_config import attention_from, decoder_from, feed_forward_from, rotary_from
from torchtune.modules.decoder import CausalLM
from torchtune.modules.layers import DecoderLayer, ParallelLayer
from torchtune.modules.norms import LayerNorm
from torchtune.modules.stored import Piece, Stored

COVERS = "StableLM 3B, StableLM 2 (1.6B, 12B)"
NAMES = {"q_norm": "q_layernorm", "k_norm": "k_layernorm"}
DEFAULTS = {
    "hidden_act": "silu",
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "num_key_value_heads": 32,
    "partial_rotary_factor": 0.25,
    "use_qkv_bias": False,
    "qk_layernorm": False,
    "use_parallel_residual": False,
}


class NormOfHeads(LayerNorm, Stored):
    """A LayerNorm with a weight for each head; the checkpoint has a tensor for each."""

    def __init__(self, num_heads: int, head_dim: int, eps: float) -> None:
        super().__init__((num_heads, head_dim), eps, bias=False)
        self.num_heads = num_heads  # of the checkpoint; a rank may hold fewer
        self.layouts = (self._one_each,)
        self.layout = self._one_each

    def _one_each(self) -> dict[str, list[Piece]]:
        return {"weight": [Piece(f"norms.{head}.weight", (head,)) for head in range(self.num_heads)]}


def build(values: Mapping[str, Any]) -> CausalLM:
    """A StableLM from its config.json."""
    config = HFConfig({**values, "head_dim": None}, DEFAULTS)  # always hidden_size over heads
    config.leave_off_dropout("hidden_dropout")

    def norm() -> LayerNorm:
        return LayerNorm(config.hidden_size, config.layer_norm_eps)

    def norms_of_heads() -> dict[str, Any]:
        if not config.qk_layernorm:
            return {}
        numbers = {"q_norm": config.num_attention_heads, "k_norm": config.num_key_value_heads}
        return {name: NormOfHeads(number, config.head_dim, config.layer_norm_eps) for name, number in numbers.items()}

    def layer(index: int) -> nn.Module:
        attention = attention_from(config, qkv_bias=bool(config.use_qkv_bias), **norms_of_heads())
        feed_forward = feed_forward_from(config)
        if config.use_parallel_residual:
            return ParallelLayer(attention, feed_forward, input_layernorm=norm())
        return DecoderLayer(attention, feed_forward, input_layernorm=norm(), post_attention_layernorm=norm())

    return decoder_from(config, layer, rotary_from(config), norm=norm(), names=NAMES)
