"""From what a user names to files whose rows can be read: a file, a folder, a pattern, standard input, a hub id."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torchtune.data.files.cache import COMPRESSED, decompressed, spooled_stdin
from torchtune.data.files.delimited import DelimitedFile
from torchtune.data.files.hub import hub_files
from torchtune.data.files.json_file import JsonFile
from torchtune.data.files.tables import TableFile, as_arrow, saved_dataset
from torchtune.data.files.text import TextFile
from torchtune.distributed.process_group import world_size
from torchtune.errors import DataError, UnsupportedError, did_you_mean

STDIN = "-"
KINDS = {
    ".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "tsv",
    ".parquet": "table", ".arrow": "table", ".feather": "table", ".txt": "text", ".md": "text", ".text": "text",
}  # fmt: skip
IN_FOLDERS = [suffix for suffix in KINDS if suffix != ".md"]  # a folder's README is not its data
# Known to the field and not read: refused by name, before a byte is taken for text.
OTHERS = {
    ".bz2": "bzip2", ".xz": "xz", ".zip": "zip", ".tar": "tar", ".xlsx": "Excel", ".yaml": "YAML", ".yml": "YAML",
    ".pkl": "pickle", ".pt": "PyTorch", ".bin": "binary", ".pdf": "PDF", ".safetensors": "safetensors",
}  # fmt: skip
READS = "JSON lines, JSON arrays, CSV, TSV, Parquet, Arrow and plain text are read, also as .gz and .zst"
MAGIC = {b"PAR1": "table", b"ARROW1": "table"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
# Names by which a folder's files are parted; the first one is what is trained on.
SPLITS = {"train": ("train", "training"), "test": ("test", "testing", "eval", "evaluation"),
          "validation": ("validation", "valid", "val", "dev")}  # fmt: skip


class RowFile(Protocol):
    """Rows of one file, by their place in it."""

    path: str
    num_bytes: int

    def __len__(self) -> int:
        """Number of rows."""

    def source(self, place: int) -> str:
        """`file:line` of a row, for people; the row is not read."""

    def record(self, place: int) -> Any:
        """The row. Raises DataError, with `source`, for one that can't be read."""


@dataclass(frozen=True)
class How:
    """What besides the path says which rows are read."""

    split: str | None = None
    subset: str | None = None
    sample_by: str = "document"


@dataclass(frozen=True)
class Found:
    """A file that was found: its name for people, and where its bytes lie."""

    name: str
    file: Path


def open_files(paths: Sequence[str], how: How) -> list[RowFile]:
    """Open all that `paths` name, in that order.

    Raises:
        DataError, UnsupportedError: says which path is wrong, and what is near it or can be read.
    """
    return [_open(found, how) for path in paths for found in _find(path, how)]


def check_paths(paths: Sequence[str], how: How) -> None:
    """Raise what `open_files` would for a path that leads nowhere; nothing is opened, fetched or taken from stdin."""
    for path in paths:
        if path != STDIN and not _is_hub_id(path):
            for found in _find(path, how):
                _refuse_others(found)


def _find(path: str, how: How) -> Iterator[Found]:
    place = Path(path).expanduser()
    if path == STDIN:
        yield _stdin()
    elif place.is_dir():
        saved = saved_dataset(place, how.split)
        files = _of_split(place, _data_files(place), how.split) if saved is None else saved
        yield from (Found(str(file), file) for file in files)
    elif place.exists():
        yield Found(path, place)
    elif glob.has_magic(path):
        matched = sorted(Path(match) for match in glob.glob(str(place), recursive=True))
        files = [match for match in matched if match.is_file()]
        if not files:
            raise DataError("no file matches this pattern", source=path)
        yield from (Found(str(file), file) for file in files)
    elif _is_hub_id(path):
        files = hub_files(path, subset=how.subset, split=how.split or "train")
        yield from (Found(path if len(files) == 1 else f"{path}/{file.name}", file) for file in files)
    else:
        around = place.parent.iterdir() if place.parent.is_dir() else ()
        raise DataError(f"there is no such file{did_you_mean(place.name, [e.name for e in around])}", source=path)


def _is_hub_id(path: str) -> bool:
    place = Path(path).expanduser()
    if place.exists() or not HUB_ID.fullmatch(path) or place.parent.is_dir():
        return False
    return place.suffix not in KINDS and place.suffix not in COMPRESSED


def _stdin() -> Found:
    if world_size() > 1:
        raise DataError("standard input can be read by one process alone; save it to a file", source=STDIN)
    return Found("standard input", spooled_stdin())


def _data_files(folder: Path) -> list[Path]:
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and _suffix(file) in IN_FOLDERS
        and not any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
        and not file.name.startswith(("dataset_info", "state.json"))
    ]
    if not files:
        names = sorted(entry.name for entry in folder.iterdir())[:8]
        raise DataError(
            f"the folder has no data file; it holds {', '.join(names) or 'nothing'}. {READS}", source=str(folder)
        )
    return files


def _of_split(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    """The files of a split, where names part them: `train-00000-of-00001.parquet`, `test/a.jsonl`."""
    by_split: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[^A-Za-z0-9]+", str(file.relative_to(folder)).lower())
        named = [name for name, spellings in SPLITS.items() if set(spellings) & set(words)]
        if split is not None and split.lower() in words:
            named = [split]
        if len(named) == 1:
            by_split.setdefault(named[0], []).append(file)
    if split is None:
        return by_split["train"] if "train" in by_split and len(by_split) > 1 else files
    canonical = next((name for name, spellings in SPLITS.items() if split in spellings), split)
    if chosen := by_split.get(split) or by_split.get(canonical):
        return chosen
    known = ", ".join(by_split) or "none: its files are not named by split"
    raise DataError(f"has no files of a split '{split}'; splits there: {known}", source=str(folder))


def _open(found: Found, how: How) -> RowFile:
    _refuse_others(found)
    name, file = found.name, found.file
    if file.stat().st_size == 0:
        raise DataError("the file is empty", source=name)
    if file.suffix.lower() in COMPRESSED:
        file = decompressed(file)
    kind = _kind(_suffix(found.file), file)
    if kind == "table":
        return TableFile(name, as_arrow(file))
    if kind in ("csv", "tsv"):
        return DelimitedFile(name, file, "\t" if kind == "tsv" else None)
    return TextFile(name, file, how.sample_by) if kind == "text" else JsonFile(name, file)


def _refuse_others(found: Found) -> None:
    suffix = _suffix(found.file)
    if suffix in OTHERS:
        raise UnsupportedError(f"{found.name}: {OTHERS[suffix]} files can't be read; {READS}")


def _kind(suffix: str, file: Path) -> str:
    """`json`, `csv`, `tsv`, `table` or `text`, by what the first bytes say, else by the name's ending."""
    with open(file, "rb") as opened:
        first = opened.readline(4096)
    for magic, kind in MAGIC.items():
        if first.startswith(magic):
            return kind
    # Standard input and files without an ending: a header line has delimiters and no brace or bracket.
    is_header = any(mark in first for mark in b",;\t") and not any(mark in first for mark in b"{}[]:")
    return KINDS.get(suffix, "csv" if is_header else "json")


def _suffix(file: Path) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""
