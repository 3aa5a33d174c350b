"""Rows of data files, by index, without holding the files in memory.

A file is mapped and indexed once by the byte offsets of its records: the lines of a JSON lines file, the
elements of a JSON array, or objects that span lines (json_values.py). What a file is, is told from its first
bytes, not its name: `.json` files hold lines and `.jsonl` files hold arrays as often as not.
"""

from __future__ import annotations

import json
import mmap
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchtune.data.json_values import index_values
from torchtune.errors import DataError, UnsupportedError, did_you_mean

BOM = b"\xef\xbb\xbf"
OTHER_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
CHUNK_BYTES = 1 << 22
SHOWN_CHARS = 60
JSON_WHITESPACE = b" \t\r\n"
# Known to the field and not read here: refused by name before a line of them is parsed.
OTHER_KINDS = {
    ".csv": "CSV", ".tsv": "TSV", ".parquet": "Parquet", ".arrow": "Arrow", ".feather": "Arrow", ".txt": "plain text",
    ".gz": "gzip", ".zst": "zstandard", ".bz2": "bzip2", ".xz": "xz", ".zip": "zip", ".xlsx": "Excel", ".yaml": "YAML",
}  # fmt: skip
READS = "JSON lines (.jsonl, .json) are read, and JSON arrays of objects"


@dataclass(frozen=True)
class Row:
    """One record as it stands in the file.

    Attributes:
        index: its place among the rows.
        record: the parsed JSON value; an object, if the row is good.
        source: `chats.jsonl:12`, with the physical line where the record begins.
    """

    index: int
    record: Any
    source: str


class Rows(Sequence[Row]):
    """Rows of one or several files, or a choice of them. Can be read by threads and sent to processes."""

    def __init__(self, files: Sequence[IndexedFile], indices: np.ndarray | None = None) -> None:
        self._files = tuple(files)
        self._ends = np.cumsum([len(file) for file in files])
        self._indices = np.arange(self._ends[-1]) if indices is None else indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        """Row `index`. Raises DataError for one that is not JSON, with file, line and column."""
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        index = range(len(self))[index]  # raises IndexError, counts negative ones from the end
        file, place = self._locate(index)
        return Row(index, file.record(place), file.source(place))

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(file.num_bytes for file in self._files)

    @property
    def name(self) -> str:
        """The files' paths, as they were given."""
        return ", ".join(file.path for file in self._files)

    def source(self, index: int) -> str:
        """`file:line` of a row, without reading it."""
        file, place = self._locate(index)
        return file.source(place)

    def select(self, indices: np.ndarray) -> Rows:
        """The rows at `indices`, in that order; their index counts from 0 again."""
        return Rows(self._files, self._indices[indices])

    def _locate(self, index: int) -> tuple[IndexedFile, int]:
        position = int(self._indices[index])
        which = int(np.searchsorted(self._ends, position, side="right"))
        return self._files[which], position - (int(self._ends[which - 1]) if which else 0)


class IndexedFile:
    """A mapped file and where its records begin and end, in bytes.

    Raises:
        DataError: it is missing, empty, or not UTF-8 text.
        UnsupportedError: it is of a kind that is not read; says which are.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        _refuse_other_kinds(path)
        self._lock = threading.Lock()
        self._mapped: mmap.mmap | None = None
        self.num_bytes = Path(path).stat().st_size
        if self.num_bytes == 0:
            raise DataError("the file is empty", source=path)
        self._starts, self._ends, self._lines = _index(self._bytes(), path)
        if len(self._starts) == 0:
            raise DataError("the file has no rows: it holds only white space", source=path)

    def __len__(self) -> int:
        return len(self._starts)

    def source(self, place: int) -> str:
        """`file:line` of a record."""
        return f"{self.path}:{self._lines[place]}"

    def record(self, place: int) -> Any:
        """The parsed record at `place`."""
        raw = self._bytes()[int(self._starts[place]) : int(self._ends[place])]
        return parse(raw, self.source(place))

    def _bytes(self) -> mmap.mmap:
        if self._mapped is None:
            with self._lock:
                if self._mapped is None:
                    with open(self.path, "rb") as file:
                        self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._mapped

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None, "_lock": None}  # a process maps the file anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


def open_rows(path: str | Path | Sequence[str | Path], *, limit: int | None = None) -> Rows:
    """Index one or several files.

    Args:
        path: a file or a list of them, read in that order.
        limit: keep only the first rows.
    """
    paths = [path] if isinstance(path, str | Path) else list(path)
    if not paths:
        raise DataError("no data file is given")
    rows = Rows([IndexedFile(str(each)) for each in paths])
    return rows if limit is None else rows[:limit]


def parse(raw: bytes, source: str) -> Any:
    """The JSON value in one line; DataError with the column and the line's beginning if there is none."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line"
        raise DataError(f"not UTF-8 text: {found}; save the file as UTF-8", source=source) from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        shown = text[:SHOWN_CHARS] + ("..." if len(text) > SHOWN_CHARS else "")
        message = error.msg.removesuffix(" starting at")
        if message == "Extra data":
            message = "something follows the JSON object, and one object a line is expected"
        problem = f"not valid JSON at column {error.pos + 1}: {message}; the line begins: {shown}"
        raise DataError(problem, source=source) from error
    except RecursionError as error:
        raise DataError("JSON that is nested too deeply", source=source) from error


def _refuse_other_kinds(path: str) -> None:
    file = Path(path)
    if file.is_dir():
        raise UnsupportedError(f"{path}: a folder can't be read as data yet; {READS}: give a file or a list of files")
    if not file.is_file():
        around = file.parent.iterdir() if file.parent.is_dir() else ()
        near = did_you_mean(file.name, [other.name for other in around if other.is_file()])
        raise DataError(f"there is no such file{near}", source=path)
    kind = OTHER_KINDS.get(file.suffix.lower())
    if kind is None:
        with open(path, "rb") as opened:
            kind = "Parquet" if opened.read(4) == b"PAR1" else None
    if kind is not None:
        raise UnsupportedError(f"{path}: {kind} files can't be read yet; {READS}")


def _index(data: mmap.mmap, path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Byte offsets where records start and end, and their line numbers."""
    if encoding := OTHER_BOMS.get(data[:2]):
        raise DataError(f"{encoding} text; save the file as UTF-8", source=path)
    begin = len(BOM) if data[: len(BOM)] == BOM else 0
    if (values := index_values(data, begin, path)) is not None:
        return values
    return _index_lines(data, begin)


def _index_lines(data: mmap.mmap, begin: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    line_ends = []
    for offset in range(begin, len(data), CHUNK_BYTES):
        chunk = np.frombuffer(data[offset : offset + CHUNK_BYTES], dtype=np.uint8)
        line_ends.append(np.flatnonzero(chunk == ord("\n")) + offset)
    ends = np.append(np.concatenate(line_ends), len(data))
    starts = np.append(begin, ends[:-1] + 1)
    lines = np.arange(1, len(starts) + 1)
    # Only lines that begin with white space (or end at once) can be blank, and few do.
    firsts = np.frombuffer(data, dtype=np.uint8)[np.minimum(starts, len(data) - 1)]
    blank = starts >= ends
    for line in np.flatnonzero(~blank & np.isin(firsts, np.frombuffer(JSON_WHITESPACE, np.uint8))):
        blank[line] = not data[starts[line] : ends[line]].strip(JSON_WHITESPACE)
    return starts[~blank], ends[~blank], lines[~blank]
