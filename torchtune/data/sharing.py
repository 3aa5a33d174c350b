"""Rows that are tokenised as they come, each by one of the ranks, and then known to all.

Packs are planned from all rows of a window, so every rank must have them; but reading them all on every rank would
cost as much as that many runs. So each rank's thread reads every so-manieth row ahead of the loop, in shares, and
where the loop needs more rows the ranks exchange the next share of each. That happens in the loop itself, whose
steps all ranks make side by side: a thread that waited for other ranks could not be ended at any moment.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

from torchtune.data.plan import WindowSize
from torchtune.data.sample import Sample
from torchtune.distributed.process_group import gather_objects
from torchtune.errors import DataError

SHARES_PER_WINDOW = 32  # few enough to outweigh an exchange, so many that a short first window isn't waited for


@dataclass
class Share:
    """Some rows that one rank has read, one after the other among its own.

    Attributes:
        rows: the samples of each.
        error: why the row after them can't be trained on; then no share follows.
    """

    rows: list[list[Sample]] = field(default_factory=list)
    error: DataError | None = None


@dataclass(frozen=True)
class ShareSize:
    """When a share is full, and how many of them make up a window.

    Attributes:
        num_rows, num_tokens: a share is full when it has as many of either.
        per_window: so many shares are read ahead.
    """

    num_rows: int
    num_tokens: int
    per_window: int

    @classmethod
    def of(cls, window: WindowSize, max_seq_len: int, num_readers: int) -> ShareSize:
        """For windows of that size, read by so many ranks."""
        num_rows = -(-window.num_rows // (SHARES_PER_WINDOW * num_readers))
        num_tokens = -(-window.enough_tokens(max_seq_len) // (SHARES_PER_WINDOW * num_readers))
        return cls(num_rows, num_tokens, per_window=-(-window.num_rows // (num_rows * num_readers)))


def shares(rows: Iterator[list[Sample]], size: ShareSize) -> Generator[Share, None, None]:
    """The rows of one rank, in shares; a row that can't be trained on ends them, in its place."""
    share, num_tokens = Share(), 0
    while True:
        try:
            row = next(rows, None)
        except DataError as error:
            share.error, row = error, None
        if row is None:
            yield share
            return
        share.rows.append(row)
        num_tokens += sum(map(len, row))
        if len(share.rows) >= size.num_rows or num_tokens >= size.num_tokens:
            yield share
            share, num_tokens = Share(), 0


def in_order(own: Iterator[Share], num_rows: int, num_readers: int) -> Iterator[list[Sample]]:
    """All rows in the order of the epoch, of which rank r has read the r-th and each `num_readers`-th after it.

    Args:
        own: this rank's shares; those of one reader are not exchanged.
    Raises:
        DataError: in the place of a row that can't be trained on; on all ranks.
    """
    ready = [deque[list[Sample]]() for _ in range(num_readers)]
    errors: list[DataError | None] = [None] * num_readers
    for index in range(num_rows):
        reader = index % num_readers
        # Each rank finds the same one empty, so all exchange here or none.
        while not ready[reader]:
            if (error := errors[reader]) is not None:
                raise error
            next_own = next(own, None) or Share()
            for rank, share in enumerate(gather_objects(next_own) if num_readers > 1 else [next_own]):
                ready[rank].extend(share.rows)
                errors[rank] = errors[rank] or share.error
            assert ready[reader] or errors[reader], "a rank has read fewer rows than are its own"
        yield ready[reader].popleft()
