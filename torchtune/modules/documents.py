"""Where documents begin and end on the flat token axis; made once a batch, shared by all layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from torchtune.distributed.mesh import Axis


@dataclass(frozen=True)
class Stretch:
    """Consecutive tokens of a document, as places on an axis on which whole documents lie one after the other.

    Attributes:
        document: which one.
        first: where what its tokens see begins: their document, or their chunk of it.
        start, end: the tokens.
    """

    document: int
    first: int
    start: int
    end: int

    def chunks(self, size: int) -> Iterator[Stretch]:
        """Its parts in each chunk of `size` tokens of the document."""
        start = self.start
        while start < self.end:
            first = start - (start - self.first) % size
            end = min(first + size, self.end)
            yield Stretch(self.document, first, start, end)
            start = end


@dataclass(frozen=True)
class Split:
    """Documents whose tokens lie on several ranks (parallel/context_parallel.py).

    Attributes:
        axis: the ranks.
        lengths: tokens of each whole document, dummies last.
        stretches: what of the documents lies here, in order.
        places: [size T] int64 on the host, where each token of the whole documents lies in what all ranks hold.
    """

    axis: Axis
    lengths: tuple[int, ...]
    stretches: tuple[Stretch, ...]
    places: Tensor


# Not frozen, though nothing changes them: of a frozen one torch 2.11 compiles anew for each number of documents.
@dataclass(eq=False)
class Documents:
    """The documents that lie one after the other in a batch.

    Where ranks share the tokens, those that lie here: each stretch of a document has a length, like a document.

    Attributes:
        lengths: tokens of each document, known to the host.
        positions: [T] int64, each token's position in its own document.
        cu_seqlens: [N + 1] int32, where each document starts, and the end.
        num_dummy: tokens at the end that only fill the axis up; they form documents of their own.
        split: how they lie on the ranks that share them, if any do.
    """

    lengths: tuple[int, ...]
    positions: Tensor
    cu_seqlens: Tensor
    num_dummy: int = 0
    split: Split | None = None

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], *, starts: Sequence[int] | None = None, device: torch.device | str | None = None
    ) -> Documents:
        """Documents of these lengths.

        Args:
            starts: the position of each document's first token; 0 unless it continues a cached one.
        """
        starts = [0] * len(lengths) if starts is None else starts
        spans = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        ends = torch.tensor([0, *lengths]).cumsum(0)
        positions = torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)
        return cls(tuple(lengths), positions.to(device), ends.to(torch.int32).to(device))

    @classmethod
    def next_tokens(cls, seen: Sequence[int], device: torch.device | str | None = None) -> Documents:
        """One token of each document, behind those that were seen of it."""
        positions = torch.tensor(seen, device=device)
        ends = torch.arange(len(seen) + 1, dtype=torch.int32, device=device)
        return cls((1,) * len(seen), positions, ends)

    @classmethod
    def from_positions(cls, positions: Tensor) -> Documents:
        """The documents that positions tell: one begins where a position is not the next, and with each row.

        Args:
            positions: [T], or [B, S] for B rows.
        """
        rows = positions if positions.dim() == 2 else positions[None]
        begins = (rows.diff(prepend=rows[:, :1] - 2) != 1).flatten()
        positions = rows.flatten()
        starts = begins.nonzero().squeeze(-1).tolist()
        ends = [*starts[1:], len(positions)]
        lengths = tuple(end - start for start, end in zip(starts, ends, strict=True))
        cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32, device=positions.device)
        return cls(lengths, positions, cu_seqlens)

    @property
    def num_tokens(self) -> int:
        """T, the tokens of all documents."""
        return sum(self.lengths)

    @property
    def num_real(self) -> int:
        """Tokens that are no dummies; these come first."""
        return self.num_tokens - self.num_dummy

    @property
    def whole_lengths(self) -> tuple[int, ...]:
        """Tokens of each document on all ranks that share them."""
        return self.lengths if self.split is None else self.split.lengths

    @property
    def reached(self) -> tuple[int, ...]:
        """For each length, the tokens of the whole document."""
        if self.split is None:
            return self.lengths
        return tuple(self.split.lengths[stretch.document] for stretch in self.split.stretches)

    @cached_property
    def max_length(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths, default=0)

    @cached_property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """Start and end of each document on the token axis, for the host."""
        spans, start = [], 0
        for length in self.lengths:
            spans.append((start, start + length))
            start += length
        return tuple(spans)

    def padded(self, num_dummy: int) -> Documents:
        """These and so many dummies behind them, one more document."""
        assert self.split is None, "documents are filled up before they are split"
        end = self.cu_seqlens[-1:] + num_dummy
        return Documents(
            (*self.lengths, num_dummy),
            torch.cat((self.positions, torch.arange(num_dummy, device=self.positions.device))),
            torch.cat((self.cu_seqlens, end)),
            self.num_dummy + num_dummy,
        )

    def chunked(self, size: int) -> Documents:
        """The same tokens, each document cut into stretches of `size`; made once a batch."""
        made: dict[int, Documents] = self.__dict__.setdefault("_chunked", {})
        if size not in made:
            whole = tuple(Stretch(index, start, start, end) for index, (start, end) in enumerate(self.bounds))
            cut = tuple(
                part for stretch in (self.split.stretches if self.split else whole) for part in stretch.chunks(size)
            )
            lengths = [stretch.end - stretch.start for stretch in cut]
            fresh = Documents.from_lengths(lengths, device=self.cu_seqlens.device)
            split = None if self.split is None else replace(self.split, stretches=cut)
            made[size] = replace(self, lengths=fresh.lengths, cu_seqlens=fresh.cu_seqlens, split=split)
        return made[size]

    def seen(self, window: int | None) -> tuple[Documents, Tensor]:
        """The keys that each stretch sees, and where these lie in what all ranks hold; made once a batch.

        Args:
            window: how many tokens back, itself included, a token sees; None means all.
        Returns:
            As many documents as there are stretches, each ends with the stretch's own tokens; and the places [M] of
            their tokens.
        """
        assert self.split is not None
        made: dict[int | None, tuple[Documents, Tensor]] = self.__dict__.setdefault("_seen", {})
        if window not in made:
            device = self.cu_seqlens.device
            spans = []
            for stretch in self.split.stretches:
                reach = stretch.first if window is None else max(stretch.first, stretch.start - window + 1)
                spans.append((reach, stretch.end))
            index = torch.cat([torch.arange(start, end) for start, end in spans])
            keys = Documents.from_lengths([end - start for start, end in spans], device=device)
            made[window] = keys, self.split.places[index].to(device, non_blocking=True)
        return made[window]

    def to(self, device: torch.device | str) -> Documents:
        """The same documents with their tensors on `device`."""
        return Documents(
            self.lengths,
            self.positions.to(device, non_blocking=True),
            self.cu_seqlens.to(device, non_blocking=True),
            self.num_dummy,
            self.split,
        )


@dataclass(eq=False)
class Rows(Documents):
    """Documents of one length, as many as there are rows in what is traced (torch.export).

    Both numbers may be symbols there, of which `Documents` could not hold a tuple.

    Attributes:
        lengths: the length, once.
    """

    num_rows: int = 1

    @classmethod
    def of(cls, input_ids: Tensor) -> Rows:
        """The rows of [B, S]."""
        num_rows, length = input_ids.shape
        positions = torch.arange(length, device=input_ids.device).repeat(num_rows)
        ends = torch.arange(0, num_rows * length + 1, length, dtype=torch.int32, device=input_ids.device)
        return cls((length,), positions, ends, num_rows=num_rows)

    @property
    def num_tokens(self) -> int:
        """T, the tokens of all rows."""
        return self.num_rows * self.lengths[0]

    @property
    def shape(self) -> tuple[int, int]:
        """B and S."""
        return self.num_rows, self.lengths[0]
