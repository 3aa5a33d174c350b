"""Gradients of parameters that several ranks hold, summed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from torchtune.distributed.mesh import Axis

BUCKET_BYTES = 64 * 2**20  # a collective's latency is nothing beside it, and it is little memory


def sum_gradients(parameters: Iterable[nn.Parameter], axis: Axis) -> None:
    """Sum each gradient over the axis, in place; a rank without one takes part with zeros.

    The sum is made in float32 where gradients are narrower, and rounded once.
    """
    if axis.size == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for grads in _buckets(parameter.grad for parameter in trained if parameter.grad is not None):
        _sum_bucket(grads, axis)


def _buckets(grads: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """By shapes alone, which are the same on all ranks; what is larger than a bucket has one to itself."""
    bucket, num_bytes = list[Tensor](), 0
    for grad in grads:
        if bucket and num_bytes + grad.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, num_bytes = [], 0
        bucket.append(grad)
        num_bytes += grad.nbytes
    if bucket:
        yield bucket


def _sum_bucket(grads: list[Tensor], axis: Axis) -> None:
    flats = [grad.reshape(-1).to(torch.promote_types(grad.dtype, torch.float32)) for grad in grads]
    flat = torch.cat(flats) if len(flats) > 1 else flats[0]  # a large one's own memory, where that can be
    axis.sum(flat)
    for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        if grad.data_ptr() != summed.data_ptr():
            grad.copy_(summed.view_as(grad))
