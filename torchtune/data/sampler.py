"""The order in which an epoch goes through the rows of a data set."""

from __future__ import annotations

import numpy as np


class RowSampler:
    """The order of each epoch: a pure function of seed and epoch, the same on every rank.

    Attributes:
        num_rows: rows of the data set.
        seed: together with the epoch it decides the order.
        shuffle: another order in each epoch; without it, the order of the file.
        epoch: the one whose order is given, from 0.
    """

    def __init__(self, num_rows: int, seed: int, shuffle: bool = True) -> None:
        self.num_rows = num_rows
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def __len__(self) -> int:
        return self.num_rows

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is given."""
        self.epoch = epoch

    def order(self, epoch: int | None = None) -> np.ndarray:
        """Row indices, int64 [num_rows], each once, in the order of `epoch` (None: the chosen one)."""
        if not self.shuffle:
            return np.arange(self.num_rows)
        return generator(self.seed, self.epoch if epoch is None else epoch, 0).permutation(self.num_rows)


def generator(seed: int, epoch: int, *place: int) -> np.random.Generator:
    """Randomness that depends on `seed`, `epoch` and the place in the epoch, and on nothing drawn before."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch], spawn_key=place)))
