"""Numbers of a checked data set: lengths, packing, duplicates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from torchtune.data.packing import pack
from torchtune.data.sample import Sample

BAR_CHARS = 40
PERCENTILES = (0, 25, 50, 75, 90, 99, 100)


@dataclass(frozen=True)
class Statistics:
    """What `tune inspect` counts, of the checked rows.

    Attributes:
        num_samples, num_tokens, num_trained: what is trained on.
        num_duplicates: samples whose ids another one before them has.
        percentiles: tokens of a sample, by percent of the samples that are no longer.
        histogram: shortest and longest length of each bin, and its samples.
        pack_tokens: tokens of a pack.
        num_packs: packs of an epoch.
        packed_share: real tokens in full packs, as a share.
        padded_share: real tokens in padded batches of eight in the order of the file, as a share.
    """

    num_samples: int
    num_tokens: int
    num_trained: int
    num_duplicates: int
    percentiles: dict[int, int]
    histogram: list[tuple[int, int, int]]
    pack_tokens: int
    num_packs: int
    packed_share: float
    padded_share: float

    def __str__(self) -> str:
        lines = [
            f"{self.num_duplicates:,} of {self.num_samples:,} samples are duplicates",
            "tokens of a sample: " + ", ".join(f"{p} % {length:,}" for p, length in self.percentiles.items()),
        ]
        most = max(count for _, _, count in self.histogram)
        for low, high, count in self.histogram:
            bar = "#" * max(round(BAR_CHARS * count / most), 1 if count else 0)
            lines.append(f"  {low:>7,} to {high:>7,}  {bar} {count:,}")
        lines.append(
            f"packed into {self.num_packs:,} rows of {self.pack_tokens:,} tokens: {self.packed_share:.1%} are real "
            f"(padded in batches of 8: {self.padded_share:.1%})"
        )
        return "\n".join(lines)


def statistics(samples: Iterable[Sample], pack_tokens: int) -> Statistics:
    """Count samples.

    Args:
        samples: all of them, at least one.
        pack_tokens: tokens of a pack.
    """
    lengths_found, num_trained, seen, duplicates = [], 0, set(), 0
    for sample in samples:
        lengths_found.append(len(sample))
        num_trained += sample.num_trained
        digest = hashlib.blake2b(sample.input_ids.tobytes(), digest_size=16).digest()
        duplicates += digest in seen
        seen.add(digest)
    lengths = np.array(lengths_found)
    packs = pack(lengths.tolist(), pack_tokens)
    num_tokens = int(lengths.sum())
    return Statistics(
        num_samples=len(lengths),
        num_tokens=num_tokens,
        num_trained=num_trained,
        num_duplicates=duplicates,
        percentiles={p: int(np.percentile(lengths, p, method="lower")) for p in PERCENTILES},
        histogram=_histogram(lengths),
        pack_tokens=pack_tokens,
        num_packs=len(packs),
        packed_share=num_tokens / (len(packs) * pack_tokens),
        padded_share=num_tokens / _padded_tokens(lengths),
    )


def _histogram(lengths: np.ndarray, num_bins: int = 10) -> list[tuple[int, int, int]]:
    shortest, longest = int(lengths.min()), int(lengths.max())
    width = max(-(-(longest - shortest + 1) // num_bins), 1)
    bins = []
    for low in range(shortest, longest + 1, width):
        high = min(low + width - 1, longest)
        bins.append((low, high, int(np.count_nonzero((lengths >= low) & (lengths <= high)))))
    return bins


def _padded_tokens(lengths: np.ndarray, batch: int = 8) -> int:
    return sum(int(lengths[i : i + batch].max()) * len(lengths[i : i + batch]) for i in range(0, len(lengths), batch))
