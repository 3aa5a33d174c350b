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
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from torchtune.distributed import failures
from torchtune.errors import ConfigError

logger = logging.getLogger(__name__)

# How long a rank waits in a collective for the others, on gloo and NCCL alike. Others may well be long at work, as at
# a checkpoint of hundreds of GB, and a rank that has died is noticed much sooner, by its closed connections.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)

T = TypeVar("T")

_num_groups = 0  # that this process has begun
_planned: int | None = None  # ranks that a launcher is about to start


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
    """Number of processes; within `planned_world_size`, of those to come."""
    return dist.get_world_size() if dist.is_initialized() else _planned or int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def planned_world_size(num_ranks: int) -> Iterator[None]:
    """Within this block, `world_size()` is that of a run which this process is about to launch."""
    global _planned
    _planned = num_ranks
    try:
        yield
    finally:
        _planned = None


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
    # gloo beside NCCL: what rests on the CPU, and what is no tensor, goes its way without the device.
    chosen = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    if backend == "nccl" and not on_cuda:
        logger.info("backend 'nccl' needs a CUDA device; this run is on the CPU and uses gloo")
    elif backend is not None:
        chosen = backend
    cuda_device = own_cuda_device(device.index if device else None) if "nccl" in chosen else None
    store, this_rank, num_ranks = next(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    store = dist.PrefixStore(_group_name(), store)
    dist.init_process_group(
        chosen,
        store=store,
        rank=this_rank,
        world_size=num_ranks,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=cuda_device,
    )
    failures.watch(dist.PrefixStore("failures", store))
    return True


def _group_name() -> str:
    """A name for this group's entries in the store, which may hold those of earlier ones, and of ranks that are gone."""
    global _num_groups
    _num_groups += 1
    # An agent that shares its store keeps it over restarts.
    is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] if is_agents else ""
    return f"attempt_{attempt}/group_{_num_groups}"


def own_cuda_device(index: int | None = None) -> torch.device:
    """The CUDA device of this process, made the current one, so that it takes no memory on another's.

    Args:
        index: by default the local rank.
    Raises:
        ConfigError: there is no such device, or under a launcher it is not the local rank's.
    """
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_devices == 0:
        raise ConfigError("'cuda' was asked for, but this machine has no CUDA device; use device=cpu", key="device")
    index = local_rank() if index is None else index
    if local_rank() and index != local_rank():
        raise ConfigError(
            f"'cuda:{index}' is not the device of local rank {local_rank()}; device=cuda gives each rank its own",
            key="device",
        )
    if index >= num_devices:
        raise ConfigError(
            f"'cuda:{index}' was asked for, but there are {num_devices} CUDA devices; start at most one process for "
            "each (--nproc_per_node)",
            key="device",
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@contextmanager
def process_group(device: torch.device | str | None = None) -> Iterator[None]:
    """Hold the launcher's process group, if there is one, and leave none behind.

    After an error on CUDA the group is left to the process's end: NCCL's own end would wait for the other ranks.
    """
    kind = torch.device(device) if device not in (None, "auto") else None
    started = init_process_group(device=kind)
    try:
        yield
    except Exception as error:
        if started:
            failures.note(error)  # before the others notice that this rank is gone
            started = "nccl" not in dist.get_backend_config()
        raise
    finally:
        if started:
            dist.destroy_process_group()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` summed over all ranks, in place, on its device; no wait for the host on CUDA."""
    if not _is_alone():
        dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Wait until every rank is here."""
    if not _is_alone():
        dist.barrier()


def broadcast_object(value: T) -> T:
    """Rank 0's `value`, on every rank."""
    if _is_alone():
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
    return bool(max_over_ranks(int(flag), device))


def max_over_ranks(number: int, device: torch.device) -> int:
    """The largest `number` of any rank, on every rank. Waits for the device."""
    if _is_alone():
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest.item())


def _is_alone() -> bool:
    """Whether there is nobody to talk to; a launcher that plans ranks does not count as one of them."""
    return _planned is not None or world_size() == 1
