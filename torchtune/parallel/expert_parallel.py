"""Expert parallelism: each rank has some of a layer's experts, and tokens go to the ranks that have theirs and back.

Source: Lepikhin et al., 2020 (arXiv:2006.16668), section 3; here no expert has a capacity and no token is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from torchtune.distributed.collectives import exchange
from torchtune.distributed.mesh import Axis
from torchtune.distributed.part import part_of, set_part
from torchtune.errors import ConfigError
from torchtune.modules.decoder import CausalLM
from torchtune.modules.moe import Experts, rows_of_tokens

OfRows = Callable[[Tensor, Tensor], Tensor]


def check_expert_parallel(model: CausalLM, size: int) -> None:
    """Whether the experts of every layer can be dealt to so many ranks.

    Raises:
        ConfigError: there are none, or their number does not divide.
    """
    if size == 1:
        return
    counts = {experts.num_experts for experts in _experts(model)}
    if not counts:
        raise ConfigError(
            f"{size}, but this model has no experts; leave it at 1, and shard by data_parallel_shard",
            key="expert_parallel",
        )
    if uneven := sorted(count for count in counts if count % size):
        fitting = [n for n in range(1, min(counts) + 1) if all(count % n == 0 for count in counts)]
        raise ConfigError(
            f"{size} does not divide the {uneven[0]} experts of a layer; use one of {', '.join(map(str, fitting))}",
            key="expert_parallel",
        )


def apply_expert_parallel(model: CausalLM, axis: Axis) -> None:
    """Leave each rank of `axis` its share of every layer's experts, and let tokens go where their experts are.

    An expert then sees the tokens of all ranks of the axis, so its gradient is their sum already, and is to be summed
    over `Mesh.same_experts` alone. The model may be on the meta device, have adapters, and be split over the tensor
    axis. All ranks of the axis must run the same forwards and backwards, with tokens or without.

    Raises:
        ConfigError: as `check_expert_parallel`.
    """
    check_expert_parallel(model, axis.size)
    if axis.size == 1:
        return
    for experts in _experts(model):
        for module in experts.modules():
            for name, stack in list(module.named_parameters(recurse=False)):
                part = part_of(module, name).take(0, axis.rank, axis.size)
                share = stack.detach().chunk(axis.size)[axis.rank].clone()
                setattr(module, name, nn.Parameter(share, requires_grad=stack.requires_grad))
                set_part(module, name, part)
        experts.of_rows = partial(_of_rows_elsewhere, experts.of_rows, axis)  # type: ignore[method-assign]


def expert_parameters(model: CausalLM) -> list[nn.Parameter]:
    """Those that expert parallelism splits: all of the experts', the adapters' on them too."""
    return [parameter for experts in _experts(model) for parameter in experts.parameters()]


def _experts(model: CausalLM) -> Iterator[Experts]:
    return (module for module in model.modules() if isinstance(module, Experts))


def _of_rows_elsewhere(of_rows: OfRows, axis: Axis, rows: Tensor, counts: Tensor) -> Tensor:
    """`Experts.of_rows` where the experts are on other ranks.

    Letters: R ranks, E experts, e = E / R of them here, N rows of this rank's tokens, M rows that come here.

    Args:
        of_rows: of the experts here.
        rows: [N, D], by expert.
        counts: [E].
    Returns:
        [N, D].
    """
    share = len(counts) // axis.size
    # [R, e], how many rows come from each rank for each expert here.
    coming = exchange(counts, [share] * axis.size, [share] * axis.size, axis).view(axis.size, share)
    # The layer's only wait for the device: the host must know how many rows go and come.
    send, receive = torch.stack((counts.view(axis.size, share).sum(1), coming.sum(1))).tolist()
    rows = exchange(rows, send, receive, axis)  # [M, D], by rank and then by expert
    order, place = _by_expert(coming, num_rows=sum(receive))
    rows = of_rows(rows_of_tokens(rows, order, place, 1), coming.sum(0))
    return exchange(rows_of_tokens(rows, place, order, 1), receive, send, axis)


def _by_expert(coming: Tensor, *, num_rows: int) -> tuple[Tensor, Tensor]:
    """Of rows by rank and then by expert, `coming` [R, e] each: which stands at each place by expert, and where each is.

    No sort: each block of rows is moved as a whole, by as much as its beginning.
    """
    begins = coming.flatten().cumsum(0).view_as(coming) - coming
    begins_by_expert = (coming.T.flatten().cumsum(0).view(coming.T.shape) - coming.T).T
    moved = (begins_by_expert - begins).flatten()
    rows = torch.arange(num_rows, device=coming.device)
    place = rows + moved.repeat_interleave(coming.flatten(), output_size=num_rows)
    return torch.empty_like(rows).scatter_(0, place, rows), place
