"""Several data sets as one, by weight or token budget.

A part's share of an epoch is a number of its rows. From epoch to epoch the part goes on where it stopped, so
that in the long run each of its rows is seen as often as every other; a part that is to give more than it
has begins again within the epoch, in another order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

from torchtune.data.prepare import Prepared
from torchtune.data.report import Report
from torchtune.data.sample import Sample
from torchtune.data.sampler import RowSampler, generator
from torchtune.errors import ConfigError


@dataclass(frozen=True)
class Share:
    """What a part of a mix gives in an epoch: a weight among the parts, a number of tokens, or each row once."""

    weight: float | None = None
    tokens: int | None = None


class Mix:
    """Checked data sets in a row: the rows of the first, then those of the second.

    Args:
        parts: the data sets.
        shares: what each gives in an epoch.
    Raises:
        ConfigError: some parts have a weight and others nothing.
    """

    def __init__(self, parts: Sequence[Prepared], shares: Sequence[Share]) -> None:
        self.parts = list(parts)
        self.rows_per_epoch = rows_per_epoch(parts, shares)
        self._row_ends = np.cumsum([part.num_rows for part in parts])

    @property
    def num_rows(self) -> int:
        """Rows of all parts, each once."""
        return int(self._row_ends[-1])

    @property
    def all_checked(self) -> bool:
        """Whether every sample is in memory."""
        return all(part.all_checked for part in self.parts)

    @cached_property
    def report(self) -> MixReport:
        """What the check found in all parts, for an epoch of the mix."""
        return MixReport([part.report for part in self.parts], self.rows_per_epoch)

    def samples_of(self, row_index: int) -> list[Sample]:
        """The samples of one row, counted over all parts; raises DataError as the part does."""
        which = int(np.searchsorted(self._row_ends, row_index, side="right"))
        first = int(self._row_ends[which - 1]) if which else 0
        return self.parts[which].samples_of(row_index - first)

    def with_max_seq_len(self, max_seq_len: int) -> Mix:
        """The same, with a limit that was chosen after the check, for the rows to come."""
        mix = copy(self)
        mix.parts = [part.with_max_seq_len(max_seq_len) for part in self.parts]
        return mix

    def checked_samples(self) -> Iterator[Sample]:
        """The samples of the rows that were checked, part after part."""
        return chain.from_iterable(part.checked_samples() for part in self.parts)

    def sampler(self, *, seed: int, shuffle: bool) -> MixSampler:
        """The order of each epoch."""
        return MixSampler([part.num_rows for part in self.parts], self.rows_per_epoch, seed=seed, shuffle=shuffle)


@dataclass(frozen=True)
class MixReport:
    """The reports of a mix's parts, and what they amount to in an epoch."""

    parts: Sequence[Report]
    rows_per_epoch: Sequence[int]

    @property
    def num_rows(self) -> int:
        """Rows of all parts, each once."""
        return sum(part.num_rows for part in self.parts)

    @property
    def num_checked_rows(self) -> int:
        """Rows that were rendered and tokenised."""
        return sum(part.num_checked_rows for part in self.parts)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(part.longest for part in self.parts)

    @property
    def estimated_samples(self) -> int:
        """Samples of an epoch."""
        return round(sum(part.estimated_samples * times for part, times in zip(self.parts, self._times, strict=True)))

    @property
    def estimated_tokens(self) -> int:
        """Tokens of an epoch."""
        return round(sum(self._tokens))

    @property
    def end_ids(self) -> set[int]:
        """The tokens by which trained turns end."""
        return set().union(*(part.end_ids for part in self.parts))

    def __str__(self) -> str:
        total = max(self.estimated_tokens, 1)
        shares = [
            f"  {part.name}: {tokens / total:.0%}, {round(tokens):,} tokens in {rows:,} rows ({times:.2f} passes)"
            for part, tokens, rows, times in zip(
                self.parts, self._tokens, self.rows_per_epoch, self._times, strict=True
            )
        ]
        return "\n".join([*map(str, self.parts), f"an epoch of the mix has about {total:,} tokens:", *shares])

    @property
    def _times(self) -> list[float]:
        return [rows / part.num_rows for part, rows in zip(self.parts, self.rows_per_epoch, strict=True)]

    @property
    def _tokens(self) -> list[float]:
        return [part.estimated_tokens * times for part, times in zip(self.parts, self._times, strict=True)]


class MixSampler(RowSampler):
    """The order of the rows of a mix.

    Args:
        num_rows: of each part.
        rows_per_epoch: of each part; more than it has repeats it.
    """

    def __init__(self, num_rows: Sequence[int], rows_per_epoch: Sequence[int], *, seed: int, shuffle: bool) -> None:
        super().__init__(sum(rows_per_epoch), seed, shuffle)
        self._parts = list(zip(num_rows, rows_per_epoch, strict=True))

    def order(self, epoch: int | None = None) -> np.ndarray:
        """Row indices over all parts, int64, in the order of `epoch`; a row may come several times or not at all."""
        epoch = self.epoch if epoch is None else epoch
        chosen, first = [], 0
        for part, (num_rows, wanted) in enumerate(self._parts):
            chosen.append(first + self._rows_of(part, num_rows, epoch * wanted, wanted))
            first += num_rows
        order = np.concatenate(chosen)
        return order[generator(self.seed, epoch, 0).permutation(len(order))] if self.shuffle else order

    def _rows_of(self, part: int, num_rows: int, begin: int, wanted: int) -> np.ndarray:
        """`wanted` rows from place `begin` on of the part's endless order, which passes over it again and again."""
        rounds = range(begin // num_rows, -(-(begin + wanted) // num_rows))
        passes = [
            generator(self.seed, again, 2, part).permutation(num_rows) if self.shuffle else np.arange(num_rows)
            for again in rounds
        ]
        skip = begin - rounds.start * num_rows
        return np.concatenate(passes)[skip : skip + wanted]


def rows_per_epoch(parts: Sequence[Prepared], shares: Sequence[Share]) -> list[int]:
    """How many rows each part gives in an epoch; an epoch of weighted parts has as many tokens as they have in all."""
    weighted = [i for i, share in enumerate(shares) if share.weight is not None]
    left = [i for i, share in enumerate(shares) if share.weight is None and share.tokens is None]
    if weighted and left:
        raise ConfigError(
            f"part {left[0] + 1} of the mix has neither weight nor tokens, but part {weighted[0] + 1} has a weight; "
            "give each a weight, or tokens",
            key="dataset.mix",
        )
    tokens = [max(part.report.estimated_tokens, 1) for part in parts]
    total = sum(tokens[i] for i in weighted)
    weights = sum(shares[i].weight or 0 for i in weighted)
    rows = []
    for i, (part, share) in enumerate(zip(parts, shares, strict=True)):
        if share.weight is not None:
            wanted = part.num_rows * total * share.weight / weights / tokens[i]
        elif share.tokens is not None:
            wanted = part.num_rows * share.tokens / tokens[i]
        else:
            wanted = part.num_rows
        rows.append(max(round(wanted), 1))
    return rows
