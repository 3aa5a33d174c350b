"""Where documents begin and end on the flat token axis; made once a batch, shared by all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """The documents that lie one after the other in a batch.

    Attributes:
        lengths: tokens of each document, known to the host.
        positions: [T] int64, each token's position in its own document.
        cu_seqlens: [N + 1] int32, where each document starts, and the end.
    """

    lengths: tuple[int, ...]
    positions: Tensor
    cu_seqlens: Tensor

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

    def chunked(self, size: int) -> Documents:
        """The same tokens, each document cut into stretches of `size`; made once a batch."""
        made: dict[int, Documents] = self.__dict__.setdefault("_chunked", {})
        if size not in made:
            lengths = [min(size, length - at) for length in self.lengths for at in range(0, length, size)]
            cut = Documents.from_lengths(lengths, device=self.cu_seqlens.device)
            made[size] = Documents(cut.lengths, self.positions, cut.cu_seqlens)
        return made[size]

    def to(self, device: torch.device | str) -> Documents:
        """The same documents with their tensors on `device`."""
        return Documents(
            self.lengths, self.positions.to(device, non_blocking=True), self.cu_seqlens.to(device, non_blocking=True)
        )
