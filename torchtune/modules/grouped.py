"""Products of groups of rows, each group with a matrix of its own: the experts' linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def grouped_linear(x: Tensor, weight: Tensor, counts: Sequence[int], *, transposed: bool = False) -> Tensor:
    """Row by row, x @ weight[e].T, where the first counts[0] rows belong to matrix 0, the next counts[1] to 1, ...

    Weights are cast to x's type on the way and not kept in it. No row is padded and none is dropped.

    Letters: T rows, E matrices.

    Args:
        x: [T, in].
        weight: [E, out, in], or [E, in, out] where `transposed`.
        counts: E numbers whose sum is T.
    Returns:
        [T, out].
    """
    out: Tensor = _GroupedLinear.apply(x, weight, tuple(counts), transposed)
    return out


class _GroupedLinear(torch.autograd.Function):
    """One node: under autograd a slice of `weight` a group would add a whole gradient a group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: tuple[int, ...], transposed: bool) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.counts, ctx.transposed = counts, transposed
        return _products(x, weight if transposed else weight.mT, counts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        grad = grads[0]
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _products(grad, weight.mT if ctx.transposed else weight, ctx.counts)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
            for expert, rows in _groups(ctx.counts):
                part = x[rows].T @ grad[rows] if ctx.transposed else grad[rows].T @ x[rows]
                grad_weight[expert] = part
        return grad_x, grad_weight, None, None


def _products(x: Tensor, matrices: Tensor, counts: tuple[int, ...]) -> Tensor:
    """x [T, in], matrices [E, in, out] -> [T, out]."""
    if x.device.type == "cuda" and x.dtype == torch.bfloat16:
        ends = torch.tensor(counts, dtype=torch.int32).cumsum(0).to(device=x.device, dtype=torch.int32)
        return torch._grouped_mm(x, matrices.to(x.dtype), offs=ends)
    out = x.new_empty(x.shape[0], matrices.shape[2])
    for expert, rows in _groups(counts):
        torch.mm(x[rows], matrices[expert].to(x.dtype), out=out[rows])
    return out


def _groups(counts: tuple[int, ...]) -> list[tuple[int, slice]]:
    groups, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            groups.append((expert, slice(start, start + count)))
        start += count
    return groups
