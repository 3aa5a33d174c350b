"""Gradients of replicated parameters, summed over ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from torchtune.distributed.process_group import world_size

BUCKET_ELEMENTS = 16 * 2**20


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum each gradient over all ranks, in place; a rank without one takes part with zeros."""
    if world_size() == 1:
        return
    bucket: list[torch.Tensor] = []
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        if sum(grad.numel() for grad in bucket) >= BUCKET_ELEMENTS:
            _sum_bucket(bucket)
            bucket = []
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(grads: list[torch.Tensor]) -> None:
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat)
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))
