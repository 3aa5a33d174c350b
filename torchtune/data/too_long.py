"""What becomes of samples that are longer than `max_seq_len`.

The default is `drop` for conversations and completions: half an answer teaches the model to stop nowhere, and
a sample cut within its prompt teaches nothing. Texts are split, since any part of one is a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torchtune.data.sample import Sample

LISTED = 5


@dataclass
class CutCounts:
    """What was cut.

    Attributes:
        num_samples: samples that were too long.
        num_tokens: tokens that are not seen because of it.
        num_trained: those of them that would have been trained.
        num_without_trained: samples with no trained token among their first `max_seq_len`.
        listed: `file:line (length)` of the first few.
    """

    num_samples: int = 0
    num_tokens: int = 0
    num_trained: int = 0
    num_without_trained: int = 0
    listed: list[str] = field(default_factory=list)

    def add(self, sample: Sample, kept: Sequence[Sample], max_seq_len: int) -> None:
        """Count a sample that was too long, and what was kept of it."""
        self.num_samples += 1
        self.num_tokens += len(sample) - sum(map(len, kept))
        self.num_trained += sample.num_trained - sum(part.num_trained for part in kept)
        self.num_without_trained += not sample.trained[:max_seq_len].any()
        if len(self.listed) < LISTED:
            self.listed.append(f"{sample.source} ({len(sample):,})")

    def add_all(self, later: CutCounts) -> None:
        """Count what was cut of later rows."""
        self.num_samples += later.num_samples
        self.num_tokens += later.num_tokens
        self.num_trained += later.num_trained
        self.num_without_trained += later.num_without_trained
        self.listed = (self.listed + later.listed)[:LISTED]


def cut(samples: Sequence[Sample], max_seq_len: int | None, policy: str, counts: CutCounts) -> list[Sample]:
    """The samples within `max_seq_len` tokens, by `policy`; what has no trained token left is left out.

    Args:
        policy: `drop`; `truncate`: the first `max_seq_len` tokens; `split`: parts of `max_seq_len` tokens, of
            which each but the first loses its first target, since nothing in the part predicts it; or `error`:
            the same as `drop`, for a caller that raises when `counts` is not empty.
        counts: is added to.
    """
    kept: list[Sample] = []
    for sample in samples:
        if max_seq_len is None or len(sample) <= max_seq_len:
            kept.append(sample)
            continue
        parts = [] if policy in ("drop", "error") else _parts(sample, max_seq_len)
        parts = [part for part in (parts[:1] if policy == "truncate" else parts) if part.num_trained]
        counts.add(sample, parts, max_seq_len)
        kept += parts
    return kept


def _parts(sample: Sample, length: int) -> list[Sample]:
    parts = []
    for begin in range(0, len(sample), length):
        trained = sample.trained[begin : begin + length].copy()
        trained[:1] = False
        parts.append(Sample(sample.input_ids[begin : begin + length], trained, sample.source, sample.row))
    return parts
