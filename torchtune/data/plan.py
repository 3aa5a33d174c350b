"""Packs are a plan, not a buffer: which samples share a pack, and which packs an optimizer step has.

    order of the epoch   row 7, row 2, row 9, ...                          sampler.py
    windows              the next rows of that order, until full           WindowSize
    packs                a window's samples, packed, in a seeded order     Plan.windows
    steps                the next packs, over the windows' borders         loader.py
    micro-batches        a step's packs, dealt to ranks by their cost      deal

Each line is a pure function of the seed, the epoch and the rows of the window. So a place in an epoch is two
numbers, the window's first row and the packs of it that are gone, and neither the number of ranks nor that of
workers changes what an optimizer step trains on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import TypeVar

from torchtune.data.packing import pack
from torchtune.data.sample import Sample
from torchtune.data.sampler import generator
from torchtune.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class WindowSize:
    """How many rows are packed together, and so the most that is tokenised again on resume.

    Attributes:
        num_rows, num_tokens: a window is full when it has as many of either. 4,096 rows pack almost
            without gaps; a million tokens are a second or two of tokenising.
        packs: tokens of at least so many full packs are taken, whatever `num_tokens` says.
        first: rows of the first window; each later one is as long as all before it, up to `num_rows`. A
            short first window is a short wait for step 1 where rows are tokenised as they come.
    """

    num_rows: int = 4096
    num_tokens: int = 2**20
    packs: int = 64
    first: int = 4096

    def is_full(self, start: int, num_rows: int, num_tokens: int, max_seq_len: int) -> bool:
        """Whether the window from row `start` of the order ends after `num_rows` rows with `num_tokens` tokens."""
        enough_rows = min(self.num_rows, max(self.first, start))
        return num_rows >= enough_rows or num_tokens >= self.enough_tokens(max_seq_len)

    def enough_tokens(self, max_seq_len: int) -> int:
        """The tokens that fill a window."""
        return max(self.num_tokens, self.packs * max_seq_len)


WINDOW_IN_MEMORY = WindowSize()
WINDOW_TOKENISED_AHEAD = WindowSize(first=256)


@dataclass(frozen=True)
class Pack:
    """Samples that lie together on the token axis; a single one when the data is not packed.

    Attributes:
        num_rows: rows of the data set that begin in this pack (a row may give several samples).
        num_tokens, num_trained: tokens of all samples, and those of them that are trained.
    """

    samples: tuple[Sample, ...]
    num_rows: int
    num_tokens: int = field(init=False)
    num_trained: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_tokens", sum(len(sample.input_ids) for sample in self.samples))
        object.__setattr__(self, "num_trained", sum(sample.num_trained for sample in self.samples))


@dataclass(frozen=True)
class Window:
    """The packs made of rows `start` to `end` (exclusive) of the epoch's order, in the order of training."""

    start: int
    end: int
    packs: tuple[Pack, ...]


@dataclass(frozen=True)
class Plan:
    """How one epoch's rows become packs.

    Attributes:
        seed, epoch: decide the order of a window's packs.
        max_seq_len: tokens of a pack at most.
        packed: several samples a pack, or one.
        shuffle: packs in a seeded order (best-fit packing sorts by length, training must not), or by
            their first samples.
        size: what ends a window.
    """

    seed: int
    epoch: int
    max_seq_len: int
    packed: bool
    shuffle: bool
    size: WindowSize

    def windows(self, rows: Iterable[Sequence[Sample]], start: int = 0) -> Iterator[Window]:
        """The windows from row `start` of the order on, each as soon as its rows are read.

        Args:
            rows: the samples of each row from `start` on, in the epoch's order.
        Raises:
            DataError: a sample is longer than `max_seq_len`; names its file and line.
        """
        for begin, taken in self._split(rows, _num_tokens, start):
            yield Window(begin, begin + len(taken), tuple(self._packs(begin, taken)))

    def num_packs(self, row_lengths: Iterable[Sequence[int]]) -> int:
        """Packs of the epoch, from the lengths of each row's samples, in the epoch's order."""
        if not self.packed:
            return sum(map(len, row_lengths))
        windows = self._split(row_lengths, sum, 0)
        return sum(len(pack([n for row in taken for n in row], self.max_seq_len)) for _, taken in windows)

    def _split(self, rows: Iterable[T], num_tokens: Callable[[T], int], start: int) -> Iterator[tuple[int, list[T]]]:
        """Each window's first row and its rows; a window without a token goes on until it has one."""
        taken: list[T] = []
        total = 0
        for row in rows:
            taken.append(row)
            total += num_tokens(row)
            if total and self.size.is_full(start, len(taken), total, self.max_seq_len):
                yield start, taken
                start += len(taken)
                taken, total = [], 0
        if taken:
            yield start, taken

    def _packs(self, start: int, rows: Sequence[Sequence[Sample]]) -> Iterator[Pack]:
        samples = [sample for row in rows for sample in row]
        begins_row = [index == 0 for row in rows for index in range(len(row))]
        groups = self._groups(samples)
        if self.shuffle:
            order = generator(self.seed, self.epoch, 1, start).permutation(len(groups))
            groups = [groups[index] for index in order]
        for group in groups:
            yield Pack(tuple(samples[i] for i in group), num_rows=sum(begins_row[i] for i in group))

    def _groups(self, samples: Sequence[Sample]) -> list[list[int]]:
        lengths = [len(sample.input_ids) for sample in samples]
        for sample, length in zip(samples, lengths, strict=True):
            if length > self.max_seq_len:
                problem = f"a sample of {length} tokens is longer than max_seq_len={self.max_seq_len}"
                raise DataError(problem, source=sample.source)
        if not self.packed:
            return [[index] for index in range(len(samples))]
        return pack(lengths, self.max_seq_len)


def deal(packs: Sequence[Pack], *, world_size: int, batch_size: int, head_cost: float = 0.0) -> list[list[list[Pack]]]:
    """Deal an optimizer step's packs to ranks and micro-batches, so that all of these take about as long.

    Every rank gets the same number of micro-batches, as many as are needed for so many packs. The longest
    packs are dealt first, each to the micro-batch with the least to do that has room; of the micro-batches,
    one after the other by what they take, ranks get the next in turn, forth and back. So those that ranks run
    side by side are alike, and the sums of all are. When there are fewer packs than micro-batches, some stay
    empty: their ranks run a dummy batch.

    Args:
        packs: at most world_size x gradient_accumulation_steps x batch_size, in the order of training.
        head_cost: what the head adds for a trained token, where a token's way through the layers takes 1.
    Returns:
        Packs by rank and micro-batch; within a micro-batch in the order of training.
    """
    costs = [pack.num_tokens + head_cost * pack.num_trained for pack in packs]
    num_micro_batches = -(-len(packs) // (world_size * batch_size))
    dealt: list[list[int]] = [[] for _ in range(num_micro_batches * world_size)]
    open_ = [(0.0, number) for number in range(len(dealt))]
    cost_of = [0.0] * len(dealt)
    for index in sorted(range(len(packs)), key=lambda i: -costs[i]):
        _, number = heappop(open_)
        dealt[number].append(index)
        cost_of[number] += costs[index]
        if len(dealt[number]) < batch_size:
            heappush(open_, (cost_of[number], number))
    by_cost = [dealt[number] for number in sorted(range(len(dealt)), key=lambda i: -cost_of[i])]
    of_ranks: list[list[list[Pack]]] = [[] for _ in range(world_size)]
    for micro in range(num_micro_batches):
        alike = by_cost[micro * world_size : (micro + 1) * world_size]
        for own, numbers in zip(of_ranks, alike if micro % 2 == 0 else alike[::-1], strict=True):
            own.append([packs[index] for index in sorted(numbers)])
    return of_ranks


def _num_tokens(samples: Sequence[Sample]) -> int:
    return sum(len(sample.input_ids) for sample in samples)
