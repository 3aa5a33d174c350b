"""What the check before step 1 found, in numbers and in a few lines to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torchtune.data.too_long import CutCounts
from torchtune.errors import DataError

LISTED = 10
MAX_NOTES = 5
DONE = {"drop": "left out", "truncate": "cut short", "split": "split", "error": "refused"}


@dataclass
class Report:
    """Numbers of a data set. Where not all rows were checked they are those of the checked ones.

    Attributes:
        name: the files.
        schema: what rows are, in words.
        num_rows: all rows.
        num_checked_rows: rows that were rendered and tokenised.
        num_seen_rows: rows that were read, those included.
        num_samples, num_tokens, num_trained: what is trained on, after cutting.
        longest: tokens of the longest sample, after cutting.
        num_bad_rows: rows that were skipped (on_bad_row).
        first_bad_row: why the first of them was.
        num_left_out: rows that the user's transform left out.
        num_untrained_rows: rows of which nothing is to be trained, by their flags.
        num_rows_in_parts: rows whose turns had to become samples of their own.
        max_seq_len, too_long: the limit and the policy.
        cut: what the limit cut.
        end_ids: the tokens by which trained turns end; generation has to stop on them.
        notes: what else the user should hear of, and of how many rows it is true.
    """

    name: str
    schema: str
    num_rows: int
    max_seq_len: int | None
    too_long: str
    num_checked_rows: int = 0
    num_seen_rows: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_trained: int = 0
    longest: int = 0
    num_bad_rows: int = 0
    first_bad_row: str = ""
    num_left_out: int = 0
    num_untrained_rows: int = 0
    num_rows_in_parts: int = 0
    cut: CutCounts = field(default_factory=CutCounts)
    end_ids: set[int] = field(default_factory=set)
    notes: dict[str, int] = field(default_factory=dict)

    @property
    def estimated_samples(self) -> int:
        """Samples of all rows, if the others are like the checked ones."""
        return round(self.num_samples * self._scale)

    @property
    def estimated_tokens(self) -> int:
        """Tokens of all rows, if the others are like the checked ones."""
        return round(self.num_tokens * self._scale)

    @property
    def _scale(self) -> float:
        return self.num_rows / max(self.num_checked_rows, 1)

    def add(self, later: Report) -> None:
        """Take in what was found in later rows."""
        self.num_samples += later.num_samples
        self.num_tokens += later.num_tokens
        self.num_trained += later.num_trained
        self.longest = max(self.longest, later.longest)
        self.num_left_out += later.num_left_out
        self.num_untrained_rows += later.num_untrained_rows
        self.num_rows_in_parts += later.num_rows_in_parts
        self.cut.add_all(later.cut)
        self.end_ids |= later.end_ids
        self.notes.update(Counter(self.notes) + Counter(later.notes))

    def __str__(self) -> str:
        share = self.num_trained / max(self.num_tokens, 1)
        which = f" (the first {self.num_checked_rows:,} rendered, {self.num_seen_rows:,} read)"
        which = "" if self.num_checked_rows == self.num_rows else which
        lines = [
            f"{self.name}: {_count(self.num_rows, 'row')}{which}; {self.schema}",
            f"{_count(self.num_samples, 'sample')}, {self.num_tokens:,} tokens, {self.num_trained:,} of them trained "
            f"({share:.0%}); the longest has {self.longest:,}",
        ]
        if self.cut.num_samples:
            lines.append(self.cut_line())
        if self.num_bad_rows:
            lines.append(f"{_count(self.num_bad_rows, 'row')} skipped; the first: {self.first_bad_row}")
        if self.num_left_out:
            lines.append(f"{_count(self.num_left_out, 'row')} left out by dataset.transform")
        if self.num_untrained_rows:
            lines.append(f"{_count(self.num_untrained_rows, 'row')} left out: no turn of them is to be trained")
        if self.num_rows_in_parts:
            lines.append(
                f"{_count(self.num_rows_in_parts, 'row')} gave several samples: "
                "the template or the tokenizer writes their earlier turns otherwise than at inference"
            )
        notes = [f"{note} ({_count(number, 'row')})" for note, number in self.notes.items()]
        return "\n".join(lines + notes[:MAX_NOTES])

    def cut_line(self) -> str:
        """What the limit cut, in one line."""
        cut, total = self.cut, self.num_samples + (self.cut.num_samples if self.too_long in ("drop", "error") else 0)
        total = max(total, cut.num_samples)
        empty = ""
        if cut.num_without_trained:
            empty = f"; {cut.num_without_trained} of {total} samples have nothing to train after truncation"
        more = ", ..." if cut.num_samples > len(cut.listed) else ""
        return (
            f"{cut.num_samples} of {_count(total, 'sample')} longer than max_seq_len={self.max_seq_len}, "
            f"{DONE[self.too_long]}: {cut.num_tokens:,} tokens, {cut.num_trained:,} of them trained, are not seen"
            f"{empty}: {', '.join(cut.listed)}{more}"
        )


def bad_rows(errors: Sequence[DataError], num_rows: int) -> DataError:
    """One error for all rows that can't be trained on."""
    first = errors[0]
    lines = [first.problem]
    if len(errors) > 1:
        lines.append(f"{len(errors)} of {_count(num_rows, 'row')} can't be trained on; the others are:")
        for error in errors[1:LISTED]:
            lines.append(f"  {error.source}: {'the same' if error.problem == first.problem else error.problem}")
        if len(errors) > LISTED:
            lines.append(f"  and {len(errors) - LISTED} more")
    lines.append("dataset.on_bad_row=skip leaves such rows out and counts them")
    return DataError("\n".join(lines), source=first.source)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
