"""Products of groups of rows, each group with a matrix of its own: the experts' linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune.modules.packed import PackedWeight, dense


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor, *, transposed: bool = False) -> Tensor:
    """Row by row, x @ weight[e].T, where the first counts[0] rows belong to matrix 0, the next counts[1] to 1, ...

    Weights are cast to x's type on the way and not kept in it; packed ones are unpacked one by one. No row is padded
    and none is dropped. In bfloat16 on CUDA it is one kernel, unless they are packed; elsewhere the host reads the
    counts.

    Letters: T rows, E matrices.

    Args:
        x: [T, in].
        weight: [E, out, in], or [E, in, out] where `transposed`.
        counts: [E] int64 whose sum is T, on x's device.
    Returns:
        [T, out].
    """
    one_kernel = not isinstance(weight, PackedWeight) and _is_one_kernel(x, *weight.shape[1:])
    out: Tensor = (_GroupedLinear.apply if one_kernel else _apply_group_by_group)(x, weight, counts, transposed)
    return out


def hide_from_compiler() -> None:
    """Let torch.compile leave what goes group by group as it is: for the counts it would break off at each step.

    Not at import, where it would cost a second of loading dynamo.
    """
    global _apply_group_by_group
    _apply_group_by_group = torch.compiler.disable(_GroupedLinear.apply)


class _GroupedLinear(torch.autograd.Function):
    """One node: under autograd a slice of `weight` a group would add a whole gradient a group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, counts)
        ctx.transposed = transposed
        return _products(x, weight, counts, turned=not transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, counts = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _products(grads[0], weight, counts, turned=ctx.transposed)
        if ctx.needs_input_grad[1]:
            left, right = (x, grads[0]) if ctx.transposed else (grads[0], x)
            grad_weight = _sums_of_products(left, right, counts).to(weight.dtype)
        return grad_x, grad_weight, None, None


def _products(x: Tensor, weight: Tensor, counts: Tensor, *, turned: bool) -> Tensor:
    """x [T, in] times each group's matrix, weight [E, in, out], or [E, out, in] where `turned` -> [T, out]."""
    if not isinstance(weight, PackedWeight) and _is_one_kernel(x, *weight.shape[1:]):
        matrices = dense(weight, x)
        return F.grouped_mm(x.contiguous(), matrices.mT if turned else matrices, offs=_ends(counts))
    if torch.compiler.is_exporting():
        return _products_with_all(x, weight.mT if turned else weight, counts)
    out = x.new_empty(x.shape[0], weight.shape[1 if turned else 2])
    for expert, rows in _groups(counts.tolist()):
        matrix = dense(weight[expert], x)
        torch.mm(x[rows], matrix.T if turned else matrix, out=out[rows])
    return out


def _products_with_all(x: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """Each row times every group's matrix, of which its own is kept; x [T, in], matrices [E, in, out] -> [T, out]."""
    group = torch.bucketize(torch.arange(x.shape[0], device=x.device), counts.cumsum(0), right=True)  # [T]
    out = x.new_zeros(x.shape[0], matrices.shape[2])
    for index, matrix in enumerate(matrices.unbind()):
        out = torch.where((group == index)[:, None], x @ matrix, out)
    return out


def _sums_of_products(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    """left [T, a], right [T, b] -> [E, a, b], the sum of each group's outer products; zero where it is empty."""
    if _is_one_kernel(left, left.shape[1], right.shape[1]):
        return F.grouped_mm(left.contiguous().T, right.contiguous(), offs=_ends(counts))
    sums = left.new_empty(len(counts), left.shape[1], right.shape[1])
    start = 0
    for expert, count in enumerate(counts.tolist()):
        rows = slice(start, start + count)
        # A product over no row is a matrix of zeros.
        torch.mm(left[rows].T, right[rows], out=sums[expert])
        start += count
    return sums


_apply_group_by_group = _GroupedLinear.apply


def _is_one_kernel(x: Tensor, *sizes: int) -> bool:
    """Whether torch's kernel takes it: bfloat16 on CUDA, and rows that begin at multiples of 16 bytes.

    In a traced program (torch.export) on any device, since the host reads no counts there.
    """
    fits = x.dtype == torch.bfloat16 and all(size % 8 == 0 for size in sizes)
    if torch.compiler.is_exporting():
        return fits
    return fits and x.device.type == "cuda" and len(x) > 0


def _ends(counts: Tensor) -> Tensor:
    return counts.cumsum(0).to(torch.int32)


def _groups(counts: Sequence[int]) -> list[tuple[int, slice]]:
    groups, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            groups.append((expert, slice(start, start + count)))
        start += count
    return groups
