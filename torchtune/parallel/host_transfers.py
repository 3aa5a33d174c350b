"""FSDP's two transfers between the memories of hosts, where gloo's own take two to three times as long.

Measured on 64 MB and two ranks of a core each: gathered in 15 ms instead of 50, summed and scattered in 20 instead of
68. Gloo's reduce-scatter sends what its all-reduce does; an exchange sends a rank's share to each other and no more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule


def use_host_transfers(module: FSDPModule) -> None:
    """Let a module that FSDP shards, on the CPU, gather and scatter by these."""
    module.set_custom_all_gather(_Gather())  # type: ignore[arg-type]  # the type it asks for is private
    module.set_custom_reduce_scatter(_ReduceScatter())  # type: ignore[arg-type]


class _Memory:
    """FSDP asks for the memory of what it sends and receives."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Memory):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """output_tensor: [ranks * n], of which this rank's part is input_tensor: [n]."""
        parts = output_tensor.chunk(group.size())
        sent = [dist.broadcast(part, group=group, group_src=r, async_op=True) for r, part in enumerate(parts)]
        for work in sent:
            work.wait()


class _ReduceScatter(_Memory):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        """input_tensor: [ranks * n] of each rank -> output_tensor: [n], this rank's part of their sum."""
        assert op == dist.ReduceOp.SUM, op
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        torch.sum(received.view(group.size(), -1), dim=0, out=output_tensor)
