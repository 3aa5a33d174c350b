"""Arrow, Parquet, and what the `datasets` library saves: tables, whose rows are read by index from a mapped file."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from torchtune.data.files.cache import made_from
from torchtune.errors import DataError, MissingDependencyError, did_you_mean

BATCH_ROWS = 4096


class TableFile:
    """Rows of an Arrow file, in the file or the stream format, which is mapped and never held whole.

    Tables give every row the same keys, in nested objects too, and fill those that it has not with null. So
    nulls within a value are dropped: they say nothing. A column's own null stays.

    Args:
        path: as the user named it.
        file: where the bytes lie; not compressed (`as_arrow`).
    """

    def __init__(self, path: str, file: Path) -> None:
        self.path = path
        self._file = file
        self._lock = threading.Lock()
        self._batches: list[Any] | None = None
        self.num_bytes = file.stat().st_size
        self._row_ends = np.cumsum([len(batch) for batch in self._opened()], dtype=np.int64)
        if len(self) == 0:
            raise DataError("the table has no rows", source=path)

    def __len__(self) -> int:
        return int(self._row_ends[-1]) if len(self._row_ends) else 0

    def source(self, place: int) -> str:
        """`file:row`, from 1."""
        return f"{self.path}:{place + 1}"

    def record(self, place: int) -> dict[str, Any]:
        """The row at `place`, by column."""
        which = int(np.searchsorted(self._row_ends, place, side="right"))
        first = int(self._row_ends[which - 1]) if which else 0
        (row,) = self._opened()[which].slice(place - first, 1).to_pylist()
        return {name: _without_nulls(value) for name, value in row.items()}

    def _opened(self) -> list[Any]:
        if self._batches is None:
            with self._lock:
                if self._batches is None:
                    self._batches = list(_batches(self._file, self.path))
        return self._batches

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_batches": None, "_lock": None}  # a process maps the file anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


def as_arrow(path: Path) -> Path:
    """An Arrow file whose rows can be read by index: the file itself, or one made from Parquet or compressed Arrow."""
    pa = _pyarrow(path)
    if _is_parquet(path):
        return made_from(path, ".parquet.arrow", lambda target: _write(_parquet_batches(path), target))
    before = pa.total_allocated_bytes()
    first = next(_batches(path, str(path)), None)
    if first is not None and pa.total_allocated_bytes() > before:  # it had to be decompressed
        return made_from(path, ".arrow", lambda target: _write(_batches(path, str(path)), target))
    return path


def saved_dataset(folder: Path, split: str | None) -> list[Path] | None:
    """The Arrow files of a data set that `datasets` saved to disk, in order; None if the folder is none.

    Args:
        split: which of several; None: `train`, or the only one.
    """
    if (folder / "dataset_dict.json").exists():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        chosen = split or ("train" if "train" in splits else splits[0] if len(splits) == 1 else None)
        if chosen is None or chosen not in splits:
            asked = f"no split '{split}'{did_you_mean(str(split), splits)}" if split else "several splits"
            raise DataError(f"has {asked}; dataset.split is one of: {', '.join(splits)}", source=str(folder))
        folder = folder / chosen
    if not (folder / "state.json").exists():
        return None
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return [folder / entry["filename"] for entry in state["_data_files"]]


def _pyarrow(path: Path | str) -> Any:
    try:
        import pyarrow as pa
    except ImportError as error:
        raise MissingDependencyError("pyarrow", extra="pyarrow", needed_for=f"reading {path}") from error
    return pa


def _is_parquet(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PAR1"


def _batches(file: Path, path: str) -> Iterator[Any]:
    pa = _pyarrow(path)
    try:
        mapped = pa.memory_map(str(file))
        if mapped.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(mapped)
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index)
        else:
            mapped.seek(0)
            yield from pa.ipc.open_stream(mapped)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"not a whole Arrow file: {_first_line(error)}", source=path) from error


def _parquet_batches(path: Path) -> Iterator[Any]:
    pa = _pyarrow(path)
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=BATCH_ROWS)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"not a whole Parquet file: {_first_line(error)}", source=str(path)) from error


def _write(batches: Iterator[Any], target: Path) -> None:
    pa = _pyarrow(target)
    writer = None
    with pa.OSFile(str(target), "wb") as sink:
        for batch in batches:
            writer = writer or pa.ipc.new_file(sink, batch.schema)
            writer.write_batch(batch)
        if writer is not None:
            writer.close()
    if writer is None:
        raise DataError("the table has no rows", source=str(target))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
