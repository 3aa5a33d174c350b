"""The process group, and what a recipe asks of it.

A launcher (`tune run --nproc_per_node ...`, torchrun, Slurm) tells each process its rank through the
environment. Without one there is a group of one, for which nothing is started: every function here then
does nothing, so a recipe needs no branch for it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

T = TypeVar("T")


def launched() -> bool:
    """Whether a launcher started this process as one of several (or as one, deliberately)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """This process among all, from 0."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """This process among those of its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this process writes files and lines for all of them."""
    return rank() == 0


def init_process_group(backend: str | None = None, device: torch.device | None = None) -> bool:
    """Join the launcher's process group; without a launcher do nothing.

    Args:
        backend: `nccl` or `gloo`; None chooses by `device`. `nccl` on the CPU becomes gloo, and says so.
        device: where the model is; None means CUDA if there is any.
    Returns:
        Whether this call started the group, so that its caller ends it.
    """
    if dist.is_initialized() or not launched():
        return False
    on_cuda = torch.cuda.is_available() if device is None else device.type == "cuda"
    chosen = "nccl" if on_cuda else "gloo"
    if backend == "nccl" and chosen == "gloo":
        logger.info("backend 'nccl' needs a CUDA device; this run is on the CPU and uses gloo")
    elif backend is not None:
        chosen = backend
    dist.init_process_group(backend=chosen)
    return True


@contextmanager
def process_group(device: torch.device | str | None = None) -> Iterator[None]:
    """Hold the launcher's process group, if there is one, and leave none behind."""
    kind = torch.device(device) if device not in (None, "auto") else None
    started = init_process_group(device=kind)
    try:
        yield
    finally:
        if started:
            dist.destroy_process_group()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` summed over all ranks, in place, on its device; no wait for the host on CUDA."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def broadcast_object(value: object) -> object:
    """Rank 0's `value`, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def place_in_group() -> tuple[int, int]:
    """This rank, and how many have joined the process group; 0 of 1 without one, whatever a launcher has told."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather_objects(value: T) -> list[T]:
    """Each rank's `value`, by rank, on every rank. They are pickled, which is for what this program itself made."""
    _, num_ranks = place_in_group()
    if num_ranks == 1:
        return [value]
    gathered: list[T] = [value] * num_ranks
    dist.all_gather_object(gathered, value)
    return gathered


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on any rank; every rank gets the same answer. Waits for the device."""
    if world_size() == 1:
        return flag
    return bool(sum_over_ranks(torch.tensor(float(flag), device=device)).item())
