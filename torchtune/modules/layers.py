"""Decoder layers: how attention and feed-forward are joined to the residual stream, and where norms stand.

Norms carry the names of the checkpoints that most families have; families with others rename them.
"""

from __future__ import annotations

from torch import Tensor, nn

from torchtune.modules.documents import Documents
from torchtune.modules.kv_cache import LayerCache
from torchtune.modules.naming import Block
from torchtune.modules.rotary import RotaryAngles


class DecoderLayer(Block):
    """Attention and feed-forward, each on normed input and added to the stream (Llama).

    Args:
        shared_mlp: a feed-forward beside `mlp`, on the same input (Granite's mixtures).
        residual_scale: what each is multiplied by before it is added (Granite).
    """

    def __init__(
        self,
        attention: nn.Module,
        mlp: nn.Module,
        *,
        input_layernorm: nn.Module,
        post_attention_layernorm: nn.Module,
        shared_mlp: nn.Module | None = None,
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp
        self.shared_mlp = shared_mlp
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = post_attention_layernorm
        self.residual_scale = residual_scale

    def forward(
        self,
        hidden_states: Tensor,
        rotary: RotaryAngles | None,
        documents: Documents,
        cache: LayerCache | None = None,
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(hidden_states), rotary, documents, cache)
        hidden_states = hidden_states + self._scaled(attended)
        normed = self.post_attention_layernorm(hidden_states)
        mixed = self.mlp(normed) if self.shared_mlp is None else self.mlp(normed) + self.shared_mlp(normed)
        return hidden_states + self._scaled(mixed)

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.residual_scale == 1.0 else x * self.residual_scale


class PostNormLayer(Block):
    """Attention and feed-forward on the stream itself, each normed before it is added (OLMo 2)."""

    def __init__(
        self,
        attention: nn.Module,
        mlp: nn.Module,
        *,
        post_attention_layernorm: nn.Module,
        post_feedforward_layernorm: nn.Module,
    ) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp
        self.post_attention_layernorm = post_attention_layernorm
        self.post_feedforward_layernorm = post_feedforward_layernorm

    def forward(
        self,
        hidden_states: Tensor,
        rotary: RotaryAngles | None,
        documents: Documents,
        cache: LayerCache | None = None,
    ) -> Tensor:
        attended = self.self_attn(hidden_states, rotary, documents, cache)
        hidden_states = hidden_states + self.post_attention_layernorm(attended)
        return hidden_states + self.post_feedforward_layernorm(self.mlp(hidden_states))


class SandwichNormLayer(Block):
    """Attention and feed-forward with a norm before and after each (Gemma 2)."""

    def __init__(
        self,
        attention: nn.Module,
        mlp: nn.Module,
        *,
        input_layernorm: nn.Module,
        post_attention_layernorm: nn.Module,
        pre_feedforward_layernorm: nn.Module,
        post_feedforward_layernorm: nn.Module,
    ) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = post_attention_layernorm
        self.pre_feedforward_layernorm = pre_feedforward_layernorm
        self.post_feedforward_layernorm = post_feedforward_layernorm

    def forward(
        self,
        hidden_states: Tensor,
        rotary: RotaryAngles | None,
        documents: Documents,
        cache: LayerCache | None = None,
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(hidden_states), rotary, documents, cache)
        hidden_states = hidden_states + self.post_attention_layernorm(attended)
        mixed = self.mlp(self.pre_feedforward_layernorm(hidden_states))
        return hidden_states + self.post_feedforward_layernorm(mixed)


class ParallelLayer(Block):
    """Attention and feed-forward side by side on the same stream, added at once (GPT-NeoX, Cohere).

    Args:
        post_attention_layernorm: the feed-forward's own norm; without it the two share `input_layernorm`.
    """

    def __init__(
        self,
        attention: nn.Module,
        mlp: nn.Module,
        *,
        input_layernorm: nn.Module,
        post_attention_layernorm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = post_attention_layernorm

    def forward(
        self,
        hidden_states: Tensor,
        rotary: RotaryAngles | None,
        documents: Documents,
        cache: LayerCache | None = None,
    ) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        attended = self.self_attn(normed, rotary, documents, cache)
        if self.post_attention_layernorm is not None:
            normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + attended + self.mlp(normed)
