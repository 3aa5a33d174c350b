"""A few tokens through a decoder layer by operators alone, as in each step of decoding.

In such a step calling modules takes as long as the small operators between the products. What the modules of the usual
layer do is therefore written out here once more, over the copies of weights that few rows are multiplied with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtune.modules.attend import Scores, attend
from torchtune.modules.attention import Attention
from torchtune.modules.documents import Documents
from torchtune.modules.feed_forward import FeedForward, silu_product
from torchtune.modules.kv_cache import LayerCache
from torchtune.modules.layers import DecoderLayer
from torchtune.modules.linear import Linear
from torchtune.modules.norms import RMSNorm, rms_normed_few
from torchtune.modules.products import place_of
from torchtune.modules.rotary import RotaryAngles

OfRows = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LayerStep:
    """The usual layer (Llama, Mistral, Qwen, Phi-3): RMSNorm, attention, RMSNorm, a gated feed-forward.

    Letters: T tokens, D hidden_size.

    Attributes:
        input_norm, qkv, q_norm, k_norm, output, feed_norm, gate_up, down: what [T, ...] goes through, in this order;
            norms of queries and keys may be none.
        activation: of the gate.
        residual_scale: what attention and feed-forward are multiplied by before they are added.
        is_same: tells whether the layer is what it was when it was taken apart.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scores: Scores
    input_norm: OfRows
    qkv: OfRows
    q_norm: OfRows | None
    k_norm: OfRows | None
    output: OfRows
    feed_norm: OfRows
    gate_up: OfRows
    down: OfRows
    activation: OfRows
    residual_scale: float
    is_same: Callable[[], bool]

    def __call__(
        self, hidden_states: Tensor, rotary: RotaryAngles | None, documents: Documents, cache: LayerCache
    ) -> Tensor:
        """hidden_states [T, D] -> [T, D]: as the layer's `forward`."""
        num_turned = self.num_heads + self.num_kv_heads
        heads = self.qkv(self.input_norm(hidden_states)).view(-1, num_turned + self.num_kv_heads, self.head_dim)
        turned, v = heads[:, :num_turned], heads[:, num_turned:]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = turned[:, : self.num_heads], turned[:, self.num_heads :]
            turned = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        if rotary is not None:
            turned = rotary.turn(turned)
        q, k = turned[:, : self.num_heads], turned[:, self.num_heads :]
        context = attend(q, k, v, documents, self.scores, cache=cache)
        hidden_states = torch.add(hidden_states, self.output(context.flatten(1)), alpha=self.residual_scale)
        gate, up = self.gate_up(self.feed_norm(hidden_states)).chunk(2, dim=-1)
        gated = silu_product(gate, up) if self.activation is F.silu else self.activation(gate) * up
        return torch.add(hidden_states, self.down(gated), alpha=self.residual_scale)

    @classmethod
    def of(cls, layer: nn.Module) -> LayerStep | None:
        """Take apart a layer whose weights have been joined and copied, if it is of the usual kind."""
        if type(layer) is not DecoderLayer or layer.shared_mlp is not None:
            return None
        attention, mlp = layer.self_attn, layer.mlp
        if type(attention) is not Attention or type(mlp) is not FeedForward or not _is_usual(attention):
            return None
        qkv: list[Any] = [attention.qkv_proj] if attention.fused else [getattr(attention, f"{x}_proj") for x in "qkv"]
        gate_up: list[Any] = [mlp.gate_up_proj] if mlp.fused else [mlp.gate_proj, mlp.up_proj]
        linear = [*qkv, attention.o_proj, *gate_up, mlp.down_proj]
        norms: list[Any] = [layer.input_layernorm, layer.post_attention_layernorm]
        if attention.norm_at is not None:
            norms += [attention.q_norm, attention.k_norm]
        dtypes = {parameter.dtype for each in (*linear, *norms) for parameter in each.parameters()}
        normed = [each for norm in norms if (each := _norm(norm)) is not None]
        groups = (qkv, [attention.o_proj], gate_up, [mlp.down_proj])
        products = [each for group in groups if (each := _product(group)) is not None]
        if len(normed) < len(norms) or len(products) < len(groups) or len(dtypes) > 1:
            return None
        num_rows = sum(len(each.weight) for each in qkv)
        num_kv_heads = num_rows // (attention.head_dim * (attention.heads_per_kv_head + 2))
        return cls(
            num_heads=num_kv_heads * attention.heads_per_kv_head,
            num_kv_heads=num_kv_heads,
            head_dim=attention.head_dim,
            scores=attention.scores,
            input_norm=normed[0],
            qkv=products[0],
            q_norm=normed[2] if attention.norm_at else None,
            k_norm=normed[3] if attention.norm_at else None,
            output=products[1],
            feed_norm=normed[1],
            gate_up=products[2],
            down=products[3],
            activation=mlp.activation,
            residual_scale=layer.residual_scale,
            is_same=_watch([layer, attention, mlp], [*linear, *norms]),
        )


def _is_usual(attention: Attention) -> bool:
    if attention.fused == "by_head" or attention.norm_at not in (None, "head"):
        return False
    return attention.clip is None and attention.query_scale is None and attention.sinks is None


def _norm(norm: nn.Module) -> OfRows | None:
    if type(norm) is not RMSNorm or norm.from_one or norm.axis.size > 1:
        return None
    return partial(rms_normed_few, weight=norm.weight, eps=norm.eps)


def _product(layers: Sequence[Any]) -> OfRows | None:
    """With the weight of a layer, or those of several that are joined as they are now."""
    if any(type(each) is not Linear or each.bias_share != 1.0 for each in layers):
        return None
    held = layers[0]
    if len(layers) > 1:
        held = held.joined
        if held is None or not held.holds(layers):
            return None
    return None if held.laid_out is None else partial(held.laid_out.product, bias=held.bias)


def _watch(blocks: Sequence[nn.Module], leaves: Sequence[nn.Module]) -> Callable[[], bool]:
    """A function that tells whether children, their kinds and weights are those of now, and nobody listens to them.

    Quick, for it is asked of each layer in each step.
    """
    modules = [*blocks, *leaves]
    children = [(block._modules, name, child) for block in blocks for name, child in block._modules.items()]
    kinds = [(module, type(module)) for module in modules]
    parameters = [(leaf._parameters, name, each) for leaf in leaves for name, each in leaf._parameters.items()]
    held = [each for _, _, each in parameters if each is not None]
    places = [place_of(each) for each in held]
    hooks = [listening for each in modules for listening in (each._forward_hooks, each._forward_pre_hooks)]

    def is_same() -> bool:
        return (
            not any(hooks)
            and all(names.get(name) is one for names, name, one in children)
            and all(names.get(name) is one for names, name, one in parameters)
            and all(type(module) is kind and "forward" not in module.__dict__ for module, kind in kinds)
            and [place_of(each) for each in held] == places
        )

    return is_same
