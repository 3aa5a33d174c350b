"""All ranks, for work beside training: writing and reading checkpoints.

They talk through a gloo group of their own, on the CPU, so that nothing gets between the collectives of a step; a
thread may use it while the step goes on. What fails on one rank is told to all at the next point where they meet, and
all raise: none waits for one that is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from torchtune.distributed.process_group import rank, world_size
from torchtune.errors import RankError

# A rank that is gone is noticed at once; one that writes to a slow disk may take its time.
PATIENCE = timedelta(hours=6)

Value = TypeVar("Value")


@dataclass(frozen=True)
class _Failure:
    """Stands for the value of a rank that has failed."""

    reason: str


@dataclass(frozen=True)
class Peers:
    """The ranks, as one of them sees them; by default it is alone.

    Attributes:
        rank: this one, from 0.
        size: how many.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = field(default=None, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this is the one that does what is to be done once."""
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """Every rank's value, on every rank, in their order.

        Raises:
            RankError: a rank has failed, and says why.
        """
        return self._exchange(value)

    def meet(self) -> None:
        """Wait until all are here.

        Raises:
            RankError: as `gather`.
        """
        self._exchange(None)

    def tell(self, reason: str) -> None:
        """Meet the others, to say that this rank has failed; does not raise."""
        try:
            self._exchange(_Failure(reason))
        except RankError:
            return

    def send(self, tensor: Tensor, to: int) -> None:
        """Give a contiguous tensor on the CPU to another rank, that receives it."""
        if tensor.numel():
            dist.send(tensor.view(-1).view(torch.uint8), to, group=self.group)

    def receive(self, into: Tensor, source: int) -> None:
        """Fill a contiguous tensor on the CPU from another rank, that sends it."""
        if into.numel():
            dist.recv(into.view(-1).view(torch.uint8), source, group=self.group)

    def broadcast(self, tensor: Tensor) -> None:
        """Fill a contiguous tensor on the CPU on all ranks with what rank 0 has in it."""
        if self.group is not None and tensor.numel():
            dist.broadcast(tensor.view(-1).view(torch.uint8), 0, group=self.group)

    def _exchange(self, value: Value) -> list[Value]:
        if self.group is None:
            return [value]
        values: list[Value] = [value] * self.size
        dist.all_gather_object(values, value, group=self.group)
        failures = [(index, one.reason) for index, one in enumerate(values) if isinstance(one, _Failure)]
        if failures:
            raise RankError(failures)
        return values


class Attempt:
    """Work during which ranks wait for one another: from an error on, this one takes part and does nothing more."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __call__(self, function: Callable[..., Value], *arguments: object) -> Value | None:
        """What the function returns; None from the first error on."""
        if self.error is None:
            try:
                return function(*arguments)
            except Exception as error:  # raised by `finish`, when nobody waits for this rank
                self.error = error
        return None

    def finish(self) -> None:
        """Raise the error, if there was one."""
        if self.error is not None:
            raise self.error


@contextmanager
def open_peers() -> Iterator[Peers]:
    """All ranks of the run, with a group of their own that ends with the block. Every rank calls it."""
    if world_size() == 1 or not dist.is_initialized():
        yield Peers()
        return
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield Peers(rank(), world_size(), group)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group(group)
