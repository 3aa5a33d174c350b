"""Rows of data files, by index, without holding the files in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchtune.data.files.find import How, RowFile, open_files
from torchtune.errors import DataError

NAMED = 3  # so many files are named; of more, the number

# What a user may do to a record before anything is read from it; None leaves the row out.
Transform = Callable[[Any], Any]


@dataclass(frozen=True)
class Row:
    """One record as it stands in the file.

    Attributes:
        index: its place among the rows.
        record: the parsed value; an object, if the row is good.
        source: `chats.jsonl:12`, with the physical line where the record begins.
    """

    index: int
    record: Any
    source: str


class LeftOut(DataError):
    """The user's transform left this row out; no fault."""


class Rows(Sequence[Row]):
    """Rows of one or several files, or a choice of them. Can be read by threads and sent to processes."""

    def __init__(
        self, files: Sequence[RowFile], indices: np.ndarray | None = None, transform: Transform | None = None
    ) -> None:
        self._files = tuple(files)
        self._ends = np.cumsum([len(file) for file in files])
        self._indices = np.arange(self._ends[-1]) if indices is None else indices
        self._transform = transform

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        """Row `index`. Raises DataError for one that can't be read, with file, line and column."""
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        index = range(len(self))[index]  # raises IndexError, counts negative ones from the end
        file, place = self._locate(index)
        record, source = file.record(place), file.source(place)
        return Row(index, record if self._transform is None else _transformed(self._transform, record, source), source)

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(file.num_bytes for file in self._files)

    @property
    def name(self) -> str:
        """The files' paths, as they were given."""
        more = f" and {len(self._files) - NAMED} more files" if len(self._files) > NAMED else ""
        return ", ".join(file.path for file in self._files[:NAMED]) + more

    def source(self, index: int) -> str:
        """`file:line` of a row, without reading it."""
        file, place = self._locate(index)
        return file.source(place)

    def select(self, indices: np.ndarray) -> Rows:
        """The rows at `indices`, in that order; their index counts from 0 again."""
        return Rows(self._files, self._indices[indices], self._transform)

    def _locate(self, index: int) -> tuple[RowFile, int]:
        position = int(self._indices[index])
        which = int(np.searchsorted(self._ends, position, side="right"))
        return self._files[which], position - (int(self._ends[which - 1]) if which else 0)


def open_rows(
    path: str | Path | Sequence[str | Path],
    *,
    limit: int | None = None,
    how: How | None = None,
    transform: Transform | None = None,
) -> Rows:
    """Index all that is named, in that order.

    Args:
        path: files, folders, patterns, `-` or hub ids, one or a list (files/find.py).
        limit: keep only the first rows.
        transform: is given each record, and gives what is read in its place; None leaves the row out.
    """
    paths = [path] if isinstance(path, str | Path) else list(path)
    if not paths:
        raise DataError("no data file is given")
    rows = Rows(open_files([str(each) for each in paths], how or How()), transform=transform)
    return rows if limit is None else rows[:limit]


def _transformed(transform: Transform, record: Any, source: str) -> Any:
    try:
        changed = transform(record)
    except DataError as error:
        raise DataError(error.problem, source=source) from error
    except Exception as error:  # the user's code raises what it likes
        problem = f"dataset.transform failed on this row: {type(error).__name__}: {error}"
        raise DataError(problem, source=source) from error
    if changed is None:
        raise LeftOut("left out by dataset.transform", source=source)
    return changed
