"""Collectives along an axis that gradients go back through.

Where ranks share a layer or the tokens of a row, a gradient on one of them is its share of the sum; so a gather's
gradient is a sum that is scattered, and the other way round. They are torch's functional collectives, which
torch.compile traces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

from torchtune.distributed.mesh import Axis

# Torch 2.13 has them under new names, and warns of the old ones.
_gather_single = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
_scatter_single = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor


def gather(x: Tensor, axis: Axis) -> Tensor:
    """[t, ..] of each rank -> [t * size, ..] on all, in their order. Its gradient is summed and scattered."""
    return x if axis.group is None else _Gather.apply(x, axis.group)


def scatter_sum(x: Tensor, axis: Axis) -> Tensor:
    """[T, ..] summed over the ranks -> [T / size, ..], each its own rows. Its gradient is gathered."""
    return x if axis.group is None else _ScatterSum.apply(x, axis.group)


def sum_both_ways(x: Tensor, axis: Axis) -> Tensor:
    """The sum of all ranks' `x` on each; the gradient, of which each has a share, is summed too."""
    return x if axis.group is None else _SumBothWays.apply(x, axis.group)


def gather_last(x: Tensor, axis: Axis, sizes: Sequence[int]) -> Tensor:
    """[.., n] of each rank -> [.., sum of n] on all; no gradient goes back.

    Args:
        sizes: n of each rank.
    """
    if axis.group is None:
        return x
    longest = max(sizes)
    padded = torch.nn.functional.pad(x.detach(), (0, longest - x.shape[-1])).movedim(-1, 0).contiguous()
    every = _gathered(padded, axis.group).unflatten(0, (len(sizes), longest))
    return torch.cat([part[:size] for part, size in zip(every, sizes, strict=True)]).movedim(0, -1)


def exchange(x: Tensor, send: Sequence[int], receive: Sequence[int], axis: Axis) -> Tensor:
    """Rows of `x` to the ranks, the first `send[0]` to rank 0 and so on -> rows from them, `receive[0]` from rank 0.

    Its gradient goes the way back.
    """
    return x if axis.group is None else _Exchange.apply(x, tuple(send), tuple(receive), axis.group)


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return functional.wait_tensor(_gather_single(x.contiguous(), 0, group))


def _scattered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return functional.wait_tensor(_scatter_single(x.contiguous(), "sum", 0, group))


def _exchanged(x: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    made = functional.all_to_all_single(x.contiguous(), list(receive), list(send), group)
    return functional.wait_tensor(made)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _scattered(grads[0], ctx.group), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _scattered(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _gathered(grads[0], ctx.group), None


class _SumBothWays(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return functional.wait_tensor(functional.all_reduce(x, "sum", group))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return functional.wait_tensor(functional.all_reduce(grads[0], "sum", ctx.group)), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: tuple[int, ...], receive: tuple[int, ...], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchanged(x, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _exchanged(grads[0], ctx.receive, ctx.send, ctx.group), None, None, None
