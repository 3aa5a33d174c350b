"""Gradients of parameters that several ranks hold, summed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from torchtune.distributed.mesh import Axis

BUCKET_ELEMENTS = 16 * 2**20


def sum_gradients(parameters: Iterable[nn.Parameter], axis: Axis) -> None:
    """Sum each gradient over the axis, in place; a rank without one takes part with zeros."""
    if axis.size == 1:
        return
    bucket: list[torch.Tensor] = []
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        if sum(grad.numel() for grad in bucket) >= BUCKET_ELEMENTS:
            _sum_bucket(bucket, axis)
            bucket = []
    if bucket:
        _sum_bucket(bucket, axis)


def _sum_bucket(grads: list[torch.Tensor], axis: Axis) -> None:
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    axis.sum(flat)
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))
