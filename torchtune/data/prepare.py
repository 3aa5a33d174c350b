"""The check before step 1: every row rendered and tokenised as it will be trained, and counted.

Files under 64 MB are checked whole, and their samples stay in memory. Of larger ones the first 1,000 rows are
rendered and tokenised, and those up to 20,000 read and looked at (glance.py); all that are not in memory are
rendered when the loop comes to them, by the same renderer.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest

import numpy as np

from torchtune.data.glance import glance
from torchtune.data.options import OnBadRow, TooLong
from torchtune.data.renderer import Rendered, Renderer
from torchtune.data.report import Report, bad_rows
from torchtune.data.rows import LeftOut, Row, Rows
from torchtune.data.sample import Sample
from torchtune.data.sampler import RowSampler
from torchtune.data.too_long import CutCounts, cut
from torchtune.distributed.process_group import gather_objects, place_in_group
from torchtune.errors import DataError

logger = logging.getLogger(__name__)

WHOLE_BYTES = 64_000_000
FIRST_ROWS, GLANCED_ROWS = 1000, 20_000
CHUNK_ROWS = 256
# All bad rows of a small file are named; nobody reads on after so many.
MAX_ERRORS = 1000


class Prepared:
    """A checked data set: gives the samples of each row. Can be used by threads and sent to processes.

    Attributes:
        rows: where they come from.
        report: what the check found.
    """

    def __init__(
        self, rows: Rows, renderer: Renderer, stored: StoredSamples, report: Report, *, on_bad_row: OnBadRow
    ) -> None:
        self.rows = rows
        self.report = report
        self._renderer = renderer
        self._stored = stored
        self._on_bad_row = on_bad_row
        self._told_of_cuts = False

    @property
    def num_rows(self) -> int:
        """Rows of the data set."""
        return len(self.rows)

    @property
    def all_checked(self) -> bool:
        """Whether every sample is in memory."""
        return self.report.num_checked_rows == len(self.rows)

    def checked_samples(self) -> Iterator[Sample]:
        """The samples of the rows that were checked, in row order."""
        for row in range(self.report.num_checked_rows):
            yield from self.samples_of(row)

    def sampler(self, *, seed: int, shuffle: bool) -> RowSampler:
        """The order of each epoch."""
        return RowSampler(self.num_rows, seed, shuffle)

    def samples_of(self, row_index: int) -> list[Sample]:
        """The samples of one row, always the same; none if nothing of it is trained.

        Raises:
            DataError: a row that was not checked before can't be trained on.
        """
        if row_index < self.report.num_checked_rows:
            return self._stored.samples_of(row_index, self.rows)
        try:
            samples = self._renderer.samples(self.rows[row_index])
        except LeftOut:
            return []
        except DataError as error:
            if self._on_bad_row == "error":
                problem = f"{error.problem}; dataset.on_bad_row=skip leaves such rows out"
                raise DataError(problem, source=error.source) from error
            logger.warning("skipped a row: %s", error)
            return []
        counts = CutCounts()
        kept = cut(samples, self.report.max_seq_len, self.report.too_long, counts)
        if counts.num_samples and self.report.too_long == "error":
            raise _too_long(counts, self.report)
        if counts.num_samples and not self._told_of_cuts:
            self._told_of_cuts = True  # one line for all: there may be a hundred thousand
            logger.warning("%s; later ones are not named", replace(self.report, cut=counts).cut_line())
        return kept

    def with_max_seq_len(self, max_seq_len: int) -> Prepared:
        """The same, with a limit that was chosen after the check, for the rows to come; not below `longest`."""
        assert max_seq_len >= self.report.longest
        report = replace(self.report, max_seq_len=max_seq_len)
        return Prepared(self.rows, self._renderer, self._stored, report, on_bad_row=self._on_bad_row)


@dataclass(frozen=True)
class StoredSamples:
    """Samples in few arrays: an object for each would take more room than its tokens.

    Attributes:
        ids, trained: of all samples, int32 and bool [number of tokens].
        lengths: tokens of each sample.
        samples_per_row: how many samples each row has.
    """

    ids: np.ndarray
    trained: np.ndarray
    lengths: np.ndarray
    samples_per_row: np.ndarray

    @classmethod
    def of(cls, samples_by_row: Sequence[Sequence[Sample]]) -> StoredSamples:
        """The samples of each row."""
        samples = [sample for row in samples_by_row for sample in row]
        return cls(
            np.concatenate([np.empty(0, np.int32), *(sample.input_ids for sample in samples)]),
            np.concatenate([np.empty(0, np.bool_), *(sample.trained for sample in samples)]),
            np.array([len(sample) for sample in samples], dtype=np.int64),
            np.array([len(row) for row in samples_by_row], dtype=np.int64),
        )

    @classmethod
    def joined(cls, parts: Sequence[StoredSamples]) -> StoredSamples:
        """Those of rows one after the other."""
        parts = [cls.of([]), *parts]
        return cls(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.trained for part in parts]),
            np.concatenate([part.lengths for part in parts]),
            np.concatenate([part.samples_per_row for part in parts]),
        )

    @cached_property
    def sample_ends(self) -> np.ndarray:
        """Where each sample ends in `ids`."""
        return np.cumsum(self.lengths)

    @cached_property
    def row_ends(self) -> np.ndarray:
        """Where each row ends among the samples."""
        return np.cumsum(self.samples_per_row)

    def samples_of(self, row_index: int, rows: Rows) -> list[Sample]:
        """The samples of one row, as views."""
        first = int(self.row_ends[row_index - 1]) if row_index else 0
        last = int(self.row_ends[row_index])
        if first == last:
            return []
        source = rows.source(row_index)
        begin = int(self.sample_ends[first - 1]) if first else 0
        samples = []
        for end in self.sample_ends[first:last].tolist():
            samples.append(Sample(self.ids[begin:end], self.trained[begin:end], source, row_index))
            begin = end
        return samples


def prepare(
    rows: Rows,
    renderer: Renderer,
    *,
    max_seq_len: int | None,
    too_long: TooLong | None = None,
    on_bad_row: OnBadRow = "error",
    check_all: bool = False,
    together: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Check a data set as it will be trained on.

    Args:
        rows: the data.
        renderer: makes their samples.
        max_seq_len: tokens of a sample at most; None: there is no limit, and `report.longest` is what is needed.
        too_long: what is done with longer ones; None: too_long.py's default.
        on_bad_row: `error`: raise when any row can't be trained on, and name them; `skip`: leave them out.
        check_all: check a large file whole, too; its samples then stay in memory.
        together: all ranks of the process group check this data set side by side, and so each renders a part of its
            rows and is told the rest. By default it renders them all.
        progress: is told rows done and rows to do, now and then.
    Raises:
        DataError: rows can't be trained on, a sample is too long and that is an error, or nothing is left.
    """
    policy = too_long or ("split" if renderer.reading.schema.format == "text" else "drop")
    report = Report(rows.name, str(renderer.reading.schema), len(rows), max_seq_len, policy)
    whole = check_all or rows.num_bytes < WHOLE_BYTES
    report.num_checked_rows = len(rows) if whole else min(len(rows), FIRST_ROWS)
    stored, errors = _check(
        rows, renderer, report, stop_early=on_bad_row == "error", together=together, progress=progress
    )
    report.num_seen_rows = max(report.num_checked_rows, min(len(rows), GLANCED_ROWS))
    known = range(report.num_checked_rows)
    if len(errors) < MAX_ERRORS:
        errors += glance(rows, renderer, range(known.stop, report.num_seen_rows), known=known, progress=progress)
    if errors and on_bad_row == "error":
        raise bad_rows(errors, report.num_seen_rows)
    report.num_bad_rows, report.first_bad_row = len(errors), str(errors[0]) if errors else ""
    if report.cut.num_samples and policy == "error":
        raise _too_long(report.cut, report)
    if not report.num_trained and report.num_checked_rows == len(rows):
        raise DataError(f"nothing is left to train on.\n{report}", source=rows.name)
    return Prepared(rows, renderer, stored, report, on_bad_row=on_bad_row)


@dataclass(frozen=True)
class _Chunk:
    """What was found in some rows."""

    samples: StoredSamples
    errors: list[DataError]
    report: Report


def _check(
    rows: Rows,
    renderer: Renderer,
    report: Report,
    *,
    stop_early: bool,
    together: bool,
    progress: Callable[[int, int], None] | None,
) -> tuple[StoredSamples, list[DataError]]:
    """The samples of the first `report.num_checked_rows` rows, and what is wrong with them; counted in `report`.

    Chunks of rows are dealt to the ranks, which then exchange what they found.
    """
    rank, num_ranks = place_in_group() if together else (0, 1)
    num_rows = report.num_checked_rows
    own: list[_Chunk] = []
    num_errors = 0
    for begin in range(rank * CHUNK_ROWS, num_rows, num_ranks * CHUNK_ROWS):
        own.append(_check_chunk(rows, renderer, range(begin, min(begin + CHUNK_ROWS, num_rows)), report))
        num_errors += len(own[-1].errors)
        if stop_early and num_errors >= MAX_ERRORS:
            break
        if progress is not None:
            progress(min(begin + num_ranks * CHUNK_ROWS, num_rows), num_rows)
    by_rank = gather_objects(own) if num_ranks > 1 else [own]
    chunks = [chunk for turn in zip_longest(*by_rank) for chunk in turn if chunk is not None]
    for chunk in chunks:
        report.add(chunk.report)
    return StoredSamples.joined([chunk.samples for chunk in chunks]), [error for c in chunks for error in c.errors]


def _check_chunk(rows: Rows, renderer: Renderer, chunk: range, report: Report) -> _Chunk:
    found = Report(report.name, report.schema, report.num_rows, report.max_seq_len, report.too_long)
    kept: list[list[Sample]] = []
    errors: list[DataError] = []
    for rendered in renderer.render(list(_read(rows, chunk))):
        if isinstance(rendered.error, LeftOut):
            found.num_left_out += 1
        elif rendered.error is not None:
            errors.append(rendered.error)
        kept.append(cut(rendered.samples, report.max_seq_len, report.too_long, found.cut))
        _count(found, rendered, kept[-1])
    return _Chunk(StoredSamples.of(kept), errors, found)


def _read(rows: Rows, chunk: range) -> Iterator[Row | DataError]:
    for index in chunk:
        try:
            yield rows[index]
        except DataError as error:
            yield error


def _count(report: Report, rendered: Rendered, samples: Sequence[Sample]) -> None:
    report.num_samples += len(samples)
    report.num_tokens += sum(map(len, samples))
    report.num_trained += sum(sample.num_trained for sample in samples)
    report.longest = max([report.longest, *map(len, samples)])
    report.num_rows_in_parts += len(rendered.samples) > 1
    report.num_untrained_rows += rendered.error is None and not rendered.samples
    for sample in rendered.samples:
        ends = sample.trained & ~np.append(sample.trained[1:], False)
        report.end_ids.update(sample.input_ids[ends].tolist())
    report.notes.update(Counter(report.notes) + Counter(rendered.notes))


def _too_long(counts: CutCounts, report: Report) -> DataError:
    line = replace(report, cut=counts).cut_line()
    return DataError(
        f"{line}\ndataset.too_long=drop, truncate or split says what to do with them; a larger max_seq_len keeps them",
        source=counts.listed[0].rpartition(" ")[0],
    )
