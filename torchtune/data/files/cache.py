"""Files made from data files, kept between runs: what was compressed, or can only be read in order.

They lie in `$TORCHTUNE_CACHE`, else in `torchtune/` of the user's cache folder, by the source's path, size and
time; a source that changes gets a new one. Deleting the folder costs time alone.
"""

from __future__ import annotations

import atexit
import gzip
import hashlib
import os
import shutil
import sys
import tempfile
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchtune.errors import DataError, MissingDependencyError

COMPRESSED = {".gz": "gzip", ".zst": "zstandard"}
COPY_BYTES = 1 << 22


def cache_folder() -> Path:
    """Where such files are kept."""
    if given := os.environ.get("TORCHTUNE_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchtune"


def made_from(source: Path, suffix: str, make: Callable[[Path], None]) -> Path:
    """The file that `make` writes from `source`, made unless it is there; several processes may ask at once.

    Args:
        suffix: of the file's name; tells kinds of files made from the same source apart.
        make: writes the file that it is given.
    Raises:
        DataError: the disk is full or the folder can't be written.
    """
    about = source.stat()
    key = hashlib.sha256(f"{source.resolve()}\0{about.st_size}\0{about.st_mtime_ns}".encode()).hexdigest()[:20]
    folder = cache_folder() / "data"
    target = folder / f"{key}{suffix}"
    if target.exists():
        return target
    # Machines that share the folder have processes of the same number.
    beside = folder / f".{key}.{uuid.uuid4().hex}{suffix}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        make(beside)
        os.replace(beside, target)
    except OSError as error:
        raise DataError(
            f"can't be unpacked into {folder}: {error.strerror or error}; TORCHTUNE_CACHE names another folder",
            source=str(source),
        ) from error
    finally:
        beside.unlink(missing_ok=True)
    return target


def decompressed(path: Path) -> Path:
    """The content of a .gz or .zst file, as a file.

    Raises:
        DataError: it is damaged.
        MissingDependencyError: .zst needs the package zstandard.
    """
    inner = Path(path.stem).suffix
    return made_from(path, inner or ".data", lambda target: _decompress(path, target))


def _decompress(path: Path, target: Path) -> None:
    opened, errors = (_open_zstd if path.suffix.lower() == ".zst" else _open_gzip)(path)
    try:
        with opened as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file, COPY_BYTES)
    except errors as error:
        raise DataError(
            f"is damaged or no {COMPRESSED[path.suffix.lower()]} file: {error}", source=str(path)
        ) from error
    if target.stat().st_size == 0:
        raise DataError("the file is empty", source=str(path))


def _open_gzip(path: Path) -> tuple[Any, tuple[type[Exception], ...]]:
    return gzip.open(path, "rb"), (gzip.BadGzipFile, EOFError, zlib.error)


def _open_zstd(path: Path) -> tuple[Any, tuple[type[Exception], ...]]:
    try:
        import zstandard
    except ImportError as error:
        raise MissingDependencyError("zstandard", extra="zstandard", needed_for=f"reading {path}") from error
    return zstandard.open(path, "rb"), (zstandard.ZstdError,)


def spooled_stdin() -> Path:
    """Standard input as a temporary file, which goes when the process ends."""
    handle, name = tempfile.mkstemp(prefix="torchtune-stdin-")
    atexit.register(Path(name).unlink, missing_ok=True)
    with open(handle, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file, COPY_BYTES)
    return Path(name)
