"""The share of a vocabulary that a rank holds, where several share embedding and head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchtune.distributed.collectives import gather_last
from torchtune.distributed.mesh import Axis
from torchtune.distributed.part import Part


@dataclass(frozen=True)
class VocabularyShare:
    """Consecutive rows of a matrix that has a row a token.

    Attributes:
        axis: the ranks that share it.
        size: rows of all.
    """

    axis: Axis
    size: int

    @property
    def sizes(self) -> list[int]:
        """The rows of each rank."""
        return [Part.all_of((self.size,)).take(0, rank, self.axis.size).shape[0] for rank in range(self.axis.size)]

    def places(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of token ids [..] which of this rank's rows each is, 0 where it is none, and whether it is one."""
        sizes, rank = self.sizes, self.axis.rank
        first = sum(sizes[:rank])
        is_held = torch.ones_like(ids, dtype=torch.bool)
        # An id beyond the vocabulary stays one for the rank at that end, so that its look-up refuses it.
        if rank > 0:
            is_held &= ids >= first
        if rank < self.axis.size - 1:
            is_held &= ids < first + sizes[rank]
        return torch.where(is_held, ids - first, 0), is_held

    def whole(self, logits: Tensor) -> Tensor:
        """Logits [.., own rows] -> [.., all rows]; no gradient goes back."""
        return gather_last(logits, self.axis, self.sizes)
