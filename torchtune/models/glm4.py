"""GLM-4-0414: GLM with a norm after attention and one after the feed-forward, beside those before.

Spec: the configs and weights of GLM-4-0414.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from torchtune.models import glm
from torchtune.models.config import HFConfig
from torchtune.models.from_config import decoder_from, feed_forward_from, norms_from, rotary_from
from torchtune.modules.decoder import CausalLM
from torchtune.modules.documents import Documents
from torchtune.modules.kv_cache import LayerCache
from torchtune.modules.naming import Block
from torchtune.modules.rotary import RotaryAngles

COVERS = "GLM-4-0414, GLM-Z1 (9B, 32B)"
DEFAULTS = glm.DEFAULTS


class GLM4Layer(Block):
    """`SandwichNormLayer` under GLM's names: its `post_attention_layernorm` is the norm before the feed-forward.

    A layer of its own, since no renaming can tell that norm from the one that bears its name elsewhere.
    """

    def __init__(self, attention: nn.Module, mlp: nn.Module, norms: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = norms["input_layernorm"]
        self.post_self_attn_layernorm = norms["post_self_attn_layernorm"]
        self.post_attention_layernorm = norms["post_attention_layernorm"]
        self.post_mlp_layernorm = norms["post_mlp_layernorm"]

    def forward(
        self,
        hidden_states: Tensor,
        rotary: RotaryAngles | None,
        documents: Documents,
        cache: LayerCache | None = None,
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(hidden_states), rotary, documents, cache)
        hidden_states = hidden_states + self.post_self_attn_layernorm(attended)
        return hidden_states + self.post_mlp_layernorm(self.mlp(self.post_attention_layernorm(hidden_states)))


def build(values: Mapping[str, Any]) -> CausalLM:
    """A GLM-4-0414 from its config.json."""
    config = HFConfig(values, DEFAULTS)
    names = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")

    def layer(index: int) -> GLM4Layer:
        return GLM4Layer(glm.attention(config), feed_forward_from(config, fused=True), norms_from(config, *names))

    return decoder_from(config, layer, rotary_from(config, interleaved=True))
