"""The products of linear layers with low-rank updates, forward and backward, on plain tensors.

Autograd's nodes around them are in fused.py. Letters: T tokens, r rank, R the sum of the ranks of layers with one
input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune.modules.packed import dense


class Adapted(NamedTuple):
    """A frozen linear layer and its update, scale * B A.

    The weight may be of any type or packed. A and B are cast to the input's type on the way, their gradients come
    back in their own; without them the layer is the frozen one.

    Attributes:
        is_sum: the weight has the update in it already, rounded. A and B get the gradients that they had without the
            rounding (straight through).
    """

    weight: Tensor  # [out, in], or [in, out] where `transposed`
    bias: Tensor | None  # [out], frozen or trained
    lora_a: Tensor | None  # [r, in]
    lora_b: Tensor | None  # [out, r]
    scale: float = 1.0
    transposed: bool = False
    is_sum: bool = False


def with_update(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """W [out, in] + scale * B A, or of stacks [E, out, in], in W's type, which should be a wide one."""
    return weight + (lora_b.to(weight) @ lora_a.to(weight)) * scale


def adapted_products(layers: Sequence[Adapted], x: Tensor, adapter_input: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """The outputs [T, out] of each layer, and `low` [T, R], the product of what A sees with all A's.

    Args:
        x, adapter_input: [T, in], what the weights and the A's see.
    """
    has_update = any(layer.lora_a is not None for layer in layers)
    low = F.linear(adapter_input, _stacked_a(layers, x.dtype)) if has_update else None
    outputs = []
    for layer, columns in zip(layers, _columns(layers), strict=True):
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        output = F.linear(x, _matrix(layer, x.dtype), bias)
        if low is not None and layer.lora_b is not None and not layer.is_sum:
            output.addmm_(low[:, columns], _scaled_b(layer.lora_b, layer.scale, x.dtype))
        outputs.append(output)
    return outputs, low


def gradient_of_low(layers: Sequence[Adapted], grads: Sequence[Tensor | None]) -> Tensor | None:
    """That of `low`, [T, R], the scale in it; None where no layer has an update.

    Args:
        grads: those of the outputs, [T, out] each; None for an output that nothing came of. One is a tensor.
    """
    like = next(grad for grad in grads if grad is not None)
    parts = []
    for layer, grad in zip(layers, grads, strict=True):
        if layer.lora_b is not None and grad is not None:
            parts.append(F.linear(grad, _scaled_b(layer.lora_b, layer.scale, like.dtype)))
        elif layer.lora_b is not None:
            parts.append(like.new_zeros(like.shape[0], layer.lora_b.shape[1]))
    if len(parts) > 1:
        return torch.cat(parts, dim=1)
    return parts[0] if parts else None


def gradient_of_x(layers: Sequence[Adapted], grads: Sequence[Tensor | None], grad_low: Tensor | None) -> Tensor:
    """[T, in]: through the weights, and through the A's where `grad_low` is given and the weights are no sums."""
    reached = [(layer, grad) for layer, grad in zip(layers, grads, strict=True) if grad is not None]
    (first, grad), *others = reached
    total = grad @ _matrix(first, grad)
    for layer, grad in others:
        total.addmm_(grad, _matrix(layer, grad))
    if grad_low is None or layers[0].is_sum:
        return total
    return total.addmm_(grad_low, _stacked_a(layers, total.dtype))


def gradient_of_adapter_input(layers: Sequence[Adapted], grad_low: Tensor) -> Tensor:
    """[T, in], where A sees something else than x."""
    return grad_low @ _stacked_a(layers, grad_low.dtype)


def gradients_of_a(
    layers: Sequence[Adapted], grads: Sequence[Tensor | None], adapter_input: Tensor, grad_low: Tensor
) -> list[Tensor | None]:
    """[r, in] for each layer, None where it has no update or nothing came of its output; one product for all."""
    # The CPU has no product of half-precision matrices with a float32 result; inside it sums are float32.
    stacked = grad_low.T @ adapter_input
    return [
        None if layer.lora_a is None or grad is None else stacked[rows].to(layer.lora_a.dtype)
        for layer, grad, rows in zip(layers, grads, _columns(layers), strict=True)
    ]


def gradients_of_b(layers: Sequence[Adapted], grads: Sequence[Tensor | None], low: Tensor) -> list[Tensor | None]:
    """[out, r] for each layer, None as for A."""
    return [
        None if layer.lora_b is None or grad is None else _gradient_of_b(layer, layer.lora_b, grad, low[:, columns])
        for layer, grad, columns in zip(layers, grads, _columns(layers), strict=True)
    ]


def _gradient_of_b(layer: Adapted, lora_b: Tensor, grad: Tensor, low: Tensor) -> Tensor:
    # The scale acts before the sum is rounded: the bare one may be beyond float16. As [r, out] it is faster on the CPU.
    transposed = torch.addmm(low.new_zeros(()), low.T, grad, beta=0, alpha=layer.scale)
    return transposed.T.to(lora_b.dtype)


def gradient_of_bias(bias: Tensor, grad: Tensor) -> Tensor:
    """[out], in the bias's type, summed in the wider one."""
    return grad.sum(0, dtype=torch.promote_types(bias.dtype, grad.dtype)).to(bias.dtype)


def _columns(layers: Sequence[Adapted]) -> list[slice]:
    """Where each layer's update lies within R."""
    columns, start = [], 0
    for layer in layers:
        rank = 0 if layer.lora_a is None else layer.lora_a.shape[0]
        columns.append(slice(start, start + rank))
        start += rank
    return columns


def _stacked_a(layers: Sequence[Adapted], dtype: torch.dtype) -> Tensor:
    """All A's, [R, in]; there is one."""
    matrices = [layer.lora_a for layer in layers if layer.lora_a is not None]
    return (torch.cat(matrices) if len(matrices) > 1 else matrices[0]).to(dtype)


def _scaled_b(lora_b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale * B.T, [r, out] in order, rounded once: what both passes multiply fastest by on the CPU."""
    wide = lora_b.to(torch.promote_types(lora_b.dtype, dtype))
    return torch.mul(wide.T, scale, out=wide.new_empty(wide.shape[::-1], dtype=dtype))


def _matrix(layer: Adapted, like: torch.dtype | Tensor) -> Tensor:
    """The weight as [out, in]."""
    weight = dense(layer.weight, like)
    return weight.T if layer.transposed else weight
