"""CSV and TSV files: a header line, then a record a row (RFC 4180); a quoted field may span lines."""

from __future__ import annotations

import csv
import io
import mmap
from pathlib import Path

import numpy as np

from torchtune.data.files.lines import not_blank
from torchtune.data.files.mapped import MappedBytes
from torchtune.data.files.utf8 import begin_of_text, decode
from torchtune.errors import DataError

DELIMITERS = ",;\t"
CHUNK_BYTES = 1 << 22
csv.field_size_limit(2**31 - 1)  # the library's own limit of 131,072 characters is shorter than a long answer


class DelimitedFile:
    """Rows of a CSV or TSV file; every value is text.

    Args:
        path: as the user named it.
        file: where the bytes lie.
        delimiter: between fields; None: that of DELIMITERS that parts the header into the most columns.
    Raises:
        DataError: no header, a column named twice, or a quote that is never closed.
    """

    def __init__(self, path: str, file: Path, delimiter: str | None = None) -> None:
        self.path = path
        self._mapped = MappedBytes(file)
        data = self._mapped.data
        self.num_bytes = len(data)
        starts, ends, lines = index_records(data, begin_of_text(data, path), path)
        if len(starts) == 0:
            raise DataError("the file has no rows: it holds only white space", source=path)
        header = decode(data[starts[0] : ends[0]], f"{path}:{lines[0]}")
        self.delimiter = delimiter or max(DELIMITERS, key=lambda each: len(next(csv.reader([header], delimiter=each))))
        self.columns = self._fields(header, f"{path}:{lines[0]}")
        doubled = {name for name in self.columns if self.columns.count(name) > 1}
        if doubled:
            raise DataError(f"the header names {', '.join(sorted(doubled))} twice", source=f"{path}:{lines[0]}")
        if len(starts) == 1:
            raise DataError("the file has a header line and no rows", source=path)
        self._starts, self._ends, self._lines = starts[1:], ends[1:], lines[1:]

    def __len__(self) -> int:
        return len(self._starts)

    def source(self, place: int) -> str:
        """`file:line` of a record, with the physical line where it begins."""
        return f"{self.path}:{self._lines[place]}"

    def record(self, place: int) -> dict[str, str]:
        """The record at `place`, by column."""
        source = self.source(place)
        raw = self._mapped.data[int(self._starts[place]) : int(self._ends[place])]
        fields = self._fields(decode(raw, source), source)
        if len(fields) != len(self.columns):
            raise DataError(
                f"the row has {len(fields)} fields, the header {len(self.columns)}: {', '.join(self.columns)}; "
                "a field that holds the delimiter or a line break must be in quotes",
                source=source,
            )
        return dict(zip(self.columns, fields, strict=True))

    def _fields(self, text: str, source: str) -> list[str]:
        try:
            return next(csv.reader(io.StringIO(text, newline=""), delimiter=self.delimiter, strict=True))
        except csv.Error as error:
            raise DataError(f"not a valid line of CSV: {error}", source=source) from error


def index_records(data: mmap.mmap, begin: int, path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Byte offsets where records start and end, and their first lines: a line break ends one outside of quotes."""
    record_ends, line_ends, quoted = [], [], 0
    for offset in range(begin, len(data), CHUNK_BYTES):
        chunk = np.frombuffer(data[offset : offset + CHUNK_BYTES], dtype=np.uint8)
        inside = (np.cumsum(chunk == ord('"'), dtype=np.int64) + quoted) & 1
        quoted = int(inside[-1])
        breaks = np.flatnonzero(chunk == ord("\n"))
        line_ends.append(breaks + offset)
        record_ends.append(breaks[inside[breaks] == 0] + offset)
    ends = np.concatenate(record_ends)
    starts = np.append(begin, ends + 1)
    ends = np.append(ends, len(data))
    lines = np.searchsorted(np.concatenate(line_ends), starts) + 1
    if quoted:
        raise DataError("a quote that opens in this row is never closed", source=f"{path}:{lines[-1]}")
    # A carriage return before the line break is the break's; a blank line is no record.
    ends = ends - (np.frombuffer(data, np.uint8)[np.maximum(ends - 1, 0)] == ord("\r"))
    kept = not_blank(data, starts, ends)
    return starts[kept], ends[kept], lines[kept]
