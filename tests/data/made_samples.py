"""Sources of made-up samples. No torch here: worker processes import this file."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from torchtune.data.sample import Sample
from torchtune.errors import DataError


def made_sample(length: int, row: int, part: int = 0) -> Sample:
    """A sample whose every token says which row, part and place it comes from; odd places are trained."""
    input_ids = (row * 10_000 + part * 1_000 + np.arange(length)).astype(np.int32)
    return Sample(input_ids=input_ids, trained=np.arange(length) % 2 == 1, source=f"made.jsonl:{row + 1}", row=row)


@dataclass
class MadeSource:
    """Row i gives samples of `lengths[i]` tokens.

    Attributes:
        all_checked: what the loader is told; False makes it read as from a big file.
        seconds_per_row: how long a row takes.
        bad_row: raises DataError when it is asked for.
        asked: the rows asked for, in this process.
    """

    lengths: list[Sequence[int]]
    all_checked: bool = True
    seconds_per_row: float = 0.0
    bad_row: int | None = None
    asked: list[int] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    def samples_of(self, row_index: int) -> list[Sample]:
        self.asked.append(row_index)
        if row_index == self.bad_row:
            raise DataError("not an object", source=f"made.jsonl:{row_index + 1}")
        time.sleep(self.seconds_per_row)
        return [made_sample(length, row_index, part) for part, length in enumerate(self.lengths[row_index])]


def random_lengths(num_rows: int, *, longest: int, seed: int = 0, most_samples: int = 3) -> list[Sequence[int]]:
    """For each row the lengths of 0 to `most_samples` samples."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, longest + 1, rng.integers(0, most_samples + 1)).tolist() for _ in range(num_rows)]
