"""Linear and embedding layers as checkpoints need them: weights cast on the way, nothing drawn on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtune.modules.packed import PackedWeight, dense
from torchtune.modules.products import LaidOut, place_of, product


class Linear(nn.Linear):
    """torch's linear layer; the weight is cast to the input's type on the way, its gradient comes back in its own.

    The cast weight is not kept for the backward pass but made again there: a copy of all weights is more than
    the time of a cast is worth.

    Attributes:
        bias_share: how much of the bias it adds; less than all where the outputs of several ranks are added up.
        joined: where its weight lies together with those of other layers, of which it is the first.
        laid_out: a copy of its weight for few rows.
    """

    is_linear = True
    transposed = False
    bias_share = 1.0
    joined: Joined | None = None
    laid_out: LaidOut | None = None

    def reset_parameters(self) -> None:
        """Draw fresh weights; on the meta device there are none, and asking for them loads half of torch."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        bias = share_of(self.bias, self.bias_share)
        bias = None if bias is None else bias.to(x.dtype)
        weight = self.weight
        if weight.dtype == x.dtype and not isinstance(weight, PackedWeight):
            return product(x, weight, bias, self.laid_out)
        output: Tensor = _CastLinear.apply(x, weight, False)
        return output if bias is None else output + bias


class Conv1D(nn.Module):
    """A linear layer whose weight lies as [in, out], as GPT-2's checkpoints have it (and call it).

    Attributes:
        bias_share: as of `Linear`.
    """

    is_linear = True
    transposed = True
    bias_share = 1.0

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=0.02)
            if self.bias is not None:
                nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = _CastLinear.apply(x, self.weight, True)
        bias = share_of(self.bias, self.bias_share)
        return output if bias is None else output + bias.to(x.dtype)


class Embedding(nn.Embedding):
    """torch's embedding."""

    def reset_parameters(self) -> None:
        """As `Linear.reset_parameters`."""
        if not self.weight.is_meta:
            super().reset_parameters()


def share_of(bias: Tensor | None, share: float) -> Tensor | None:
    """What a layer adds of its bias: all, or its share where ranks add up what each makes of some inputs."""
    return bias if bias is None or share == 1.0 else bias * share


def linear_group(layers: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """The outputs of several linear layers for the same input x [T, in].

    Layers of a kind that has `together` (layers, x) compute them in one, joined ones where no gradient is asked for;
    a hook on any of them is honoured.
    """
    first = layers[0]
    joined: Joined | None = getattr(first, "joined", None)
    if joined is not None and joined.serves(layers, x):
        return torch.split_with_sizes(product(x, joined.weight, joined.bias, joined.laid_out), joined.sizes, dim=-1)
    together = getattr(type(first), "together", None)
    if together is None or any(type(layer) is not type(first) or has_hooks(layer) for layer in layers):
        return [layer(x) for layer in layers]
    outputs: Sequence[Tensor] = together(layers, x)
    return outputs


@dataclass(frozen=True)
class Joined:
    """The weights of layers with one input, one below the other in memory; each layer's own is a view of it.

    Attributes:
        weight: [sum of sizes, in]. bias: [sum of sizes] or none.
        sizes: outputs of each layer.
        places: where each layer's weight, and bias, begin in memory, and how often they had been changed.
        laid_out: a copy for few rows.
    """

    weight: Tensor
    bias: Tensor | None
    sizes: tuple[int, ...]
    places: tuple[tuple[int, object], ...]
    laid_out: LaidOut | None = None

    def serves(self, layers: Sequence[nn.Module], x: Tensor) -> bool:
        """Whether these are the layers, still as they were, and no gradient is asked for."""
        if torch.is_grad_enabled() or x.dtype != self.weight.dtype or not self.holds(layers):
            return False
        return not any(map(has_hooks, layers))

    def holds(self, layers: Sequence[nn.Module]) -> bool:
        """Whether these are the layers, with the weights that were joined."""
        return _places(layers) == self.places


def join(layers: Sequence[nn.Module]) -> None:
    """Lay the weights of linear layers with one input together, so that a token goes through them in one product.

    Their parameters stay what they are, and what they hold moves. Layers of other kinds and of several types, and
    packed weights, stay apart.
    """
    linear = [layer for layer in layers if type(layer) is Linear and type(layer.weight) is nn.Parameter]
    weights: list[Tensor] = [layer.weight for layer in linear]
    biases: list[Tensor] = [layer.bias for layer in linear if layer.bias is not None]
    if len(linear) < len(layers) or len({parameter.dtype for parameter in weights + biases}) > 1:
        return
    if len(biases) not in (0, len(layers)):
        return
    sizes = tuple(len(weight) for weight in weights)
    with torch.no_grad():
        weight, bias = torch.cat(weights), torch.cat(biases) if biases else None
        for joined, parts in ((weight, weights), (bias, biases)):
            for part, place in zip(parts, () if joined is None else joined.split(sizes), strict=True):
                part.data = place
    linear[0].joined = Joined(weight, bias, sizes, _places(linear))


def _places(layers: Sequence[Any]) -> tuple[tuple[int, object], ...]:
    # Read from where modules keep them: asked for in every step, attributes would take longer than all else here.
    held = [layer._parameters for layer in layers]
    return tuple(place_of(own[name]) for own in held for name in ("weight", "bias") if own[name] is not None)


def has_hooks(layer: nn.Module) -> bool:
    """Whether someone listens to what goes in or out, so that the layer must be called as it is."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


class _CastLinear(torch.autograd.Function):
    """x @ weight.T in x's type: x [..., in], weight [out, in], or [in, out] where `transposed` -> [..., out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.transposed = transposed
        matrix = dense(weight, x.dtype)
        return x @ matrix if transposed else F.linear(x, matrix)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            matrix = dense(weight, grad)
            grad_x = grad @ (matrix.T if ctx.transposed else matrix)
        if ctx.needs_input_grad[1]:
            left, right = (x, grad) if ctx.transposed else (grad, x)
            grad_weight = (left.flatten(0, -2).T @ right.flatten(0, -2)).to(weight.dtype)
        return grad_x, grad_weight, None
