"""Linear layers with low-rank updates, each call a single autograd node that keeps little.

Written apart, base(x) + scale * B(A(x)), a layer makes several nodes and further passes over its output. Here the
update is added to the base's product in place, layers of one input keep it once and share a product with all
their A's, and a gated product is made again in the backward pass. Source: Hu et al., 2021 (arXiv:2106.09685).

Letters: T tokens (all of x's dims but the last), r rank, R the sum of the ranks of layers with one input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchtune.adapters.low_rank import (
    Adapted,
    adapted_products,
    gradient_of_adapter_input,
    gradient_of_bias,
    gradient_of_low,
    gradient_of_x,
    gradients_of_a,
    gradients_of_b,
)

# What of a layer is no tensor: scale, transposed, is_sum.
Settings = tuple[float, bool, bool]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: float,
    *,
    transposed: bool = False,
    is_sum: bool = False,
    adapter_input: Tensor | None = None,
) -> Tensor:
    """x @ weight.T + bias + scale * (x @ lora_a.T) @ lora_b.T. Kept are x and the product with A, [T, r].

    Args:
        x: [..., in].
        weight, bias, lora_a, lora_b, scale, transposed, is_sum: as in `Adapted`.
        adapter_input: what A sees in place of x, of the same shape and type: x after dropout.
    Returns:
        [..., out], in x's type.
    Raises:
        ValueError: the weight is not frozen, or one of A and B is missing.
    """
    return _apply(x, adapter_input, [Adapted(weight, bias, lora_a, lora_b, scale, transposed, is_sum)])[0]


def lora_linears(x: Tensor, adapted: Sequence[Adapted]) -> tuple[Tensor, ...]:
    """The outputs [..., out] of several layers for one input x [..., in]. Kept are x, once, and [T, R].

    For queries, keys and values, or gate and up. Ranks and scales may differ.

    Raises:
        ValueError: as of `lora_linear`.
    """
    return _apply(x, None, adapted)


def lora_linear_of_silu_product(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: float,
) -> Tensor:
    """`lora_linear` of silu(gate) * up. Kept are gate and up [..., in], and the product with A, [T, r].

    Raises:
        ValueError: as of `lora_linear`.
    """
    _check(weight, lora_a, lora_b)
    output: Tensor = _LoRALinearOfSiluProduct.apply(gate, up, scale, weight, bias, lora_a, lora_b)
    return output


def _apply(x: Tensor, adapter_input: Tensor | None, adapted: Sequence[Adapted]) -> tuple[Tensor, ...]:
    for layer in adapted:
        _check(layer.weight, layer.lora_a, layer.lora_b)
    # Autograd sees only tensors that are arguments of their own.
    tensors = [tensor for layer in adapted for tensor in layer[:4]]
    settings = tuple(layer[4:] for layer in adapted)
    outputs: tuple[Tensor, ...] = _LoRALinears.apply(x, adapter_input, settings, *tensors)
    return outputs


def _check(weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None) -> None:
    if weight.requires_grad:
        raise ValueError(
            "the weight under a low-rank update must be frozen, for no gradient of it is computed; "
            "call weight.requires_grad_(False), or train the layer without an update"
        )
    if (lora_a is None) != (lora_b is None):
        given, absent = ("lora_b", "lora_a") if lora_a is None else ("lora_a", "lora_b")
        raise ValueError(f"{given} is given and {absent} is None; an update needs both")


class _LoRALinears(torch.autograd.Function):
    """Layers of one input; `tensors` are weight, bias, lora_a and lora_b of each, `settings` the rest of its fields."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, adapter_input: Tensor | None, settings: tuple[Settings, ...], *tensors: Any
    ) -> tuple[Tensor, ...]:
        seen = x if adapter_input is None else adapter_input
        outputs, low = adapted_products(_layers(settings, tensors), _rows(x), _rows(seen))
        needs = ctx.needs_input_grad[3:]
        ctx.save_for_backward(seen if any(needs[2::4]) else None, low if any(needs[3::4]) else None, *tensors)
        ctx.settings, ctx.shape, ctx.is_apart = settings, x.shape, adapter_input is not None
        ctx.set_materialize_grads(False)
        return tuple(output.view(*x.shape[:-1], output.shape[-1]) for output in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *output_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        seen, low, *tensors = ctx.saved_tensors
        needs_x, needs_adapter_input, _, *needs = ctx.needs_input_grad
        layers = _layers(ctx.settings, tensors)
        grads = [None if grad is None else _rows(grad) for grad in output_grads]
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        needs_low = any(needs[2::4]) or (needs_adapter_input if ctx.is_apart else needs_x)
        grad_low = gradient_of_low(layers, grads) if needs_low else None
        of_parameters = _parameter_gradients(layers, grads, needs, None if seen is None else _rows(seen), low, grad_low)
        grad_x = grad_adapter_input = None
        if needs_x:
            grad_x = gradient_of_x(layers, grads, None if ctx.is_apart else grad_low).view(ctx.shape)
        if needs_adapter_input and grad_low is not None:
            grad_adapter_input = gradient_of_adapter_input(layers, grad_low).view(ctx.shape)
        return grad_x, grad_adapter_input, None, *of_parameters


class _LoRALinearOfSiluProduct(torch.autograd.Function):
    """One layer, of silu(gate) * up; `tensors` are its weight, bias, lora_a and lora_b."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, scale: float, *tensors: Any) -> Tensor:
        product = _rows(F.silu(gate).mul_(up))
        (output,), low = adapted_products(_layers([(scale, False, False)], tensors), product, product)
        ctx.save_for_backward(gate, up, low if ctx.needs_input_grad[6] else None, *tensors)
        ctx.scale = scale
        return output.view(*gate.shape[:-1], output.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, low, *tensors = ctx.saved_tensors
        needs_gate, needs_up, _, *needs = ctx.needs_input_grad
        layers, grads = _layers([(ctx.scale, False, False)], tensors), [_rows(output_grad)]
        grad_low = gradient_of_low(layers, grads) if needs_gate or needs_up or needs[2] else None
        silu = F.silu(gate)
        product = _rows(silu * up) if needs[2] else None
        of_parameters = _parameter_gradients(layers, grads, needs, product, low, grad_low)
        del product
        grad_gate = grad_up = None
        if needs_gate or needs_up:
            grad_product = gradient_of_x(layers, grads, grad_low).view(gate.shape)
            grad_up = silu.mul_(grad_product)
            grad_product.mul_(up)
            grad_gate = torch.ops.aten.silu_backward.grad_input(grad_product, gate, grad_input=grad_product)
        return grad_gate, grad_up, None, *of_parameters


def _parameter_gradients(
    layers: Sequence[Adapted],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    seen: Tensor | None,
    low: Tensor | None,
    grad_low: Tensor | None,
) -> list[Tensor | None]:
    """Those of weight (none), bias, lora_a and lora_b of each layer in turn, where `needs` has it."""
    gradients: list[Tensor | None] = [None] * len(needs)
    for index, (layer, grad) in enumerate(zip(layers, grads, strict=True)):
        if needs[4 * index + 1] and layer.bias is not None and grad is not None:
            gradients[4 * index + 1] = gradient_of_bias(layer.bias, grad)
    if seen is not None and grad_low is not None:
        gradients[2::4] = gradients_of_a(layers, grads, seen, grad_low)
    if low is not None:
        gradients[3::4] = gradients_of_b(layers, grads, low)
    return gradients


def _layers(settings: Sequence[Settings], tensors: Sequence[Any]) -> list[Adapted]:
    of_layers = [tensors[4 * index : 4 * index + 4] for index in range(len(settings))]
    return [
        Adapted(weight, bias, lora_a, lora_b, *rest)
        for (weight, bias, lora_a, lora_b), rest in zip(of_layers, settings, strict=True)
    ]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
