"""A folder that a recipe writes at once: it must not be there before, and is whole or absent afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from torchtune.errors import CheckpointError, ConfigError


def output_folder(path: str) -> Path:
    """The folder of `output_dir`, which may be written.

    Raises:
        ConfigError: it is there and not empty, or the folder that one is in.
    """
    folder = Path(path).absolute()
    if folder == Path.cwd():
        raise ConfigError("the folder that you are in can't be replaced; name another", key="output_dir")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there and not empty; name another folder", key="output_dir")
    return folder


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder beside it to write into, which takes its name when all is written, and is removed where that fails.

    Raises:
        CheckpointError: it can't be written.
    """
    beside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        yield beside
        _let_others_read(beside)
        if folder.exists():
            folder.rmdir()
        beside.rename(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"can't be written: {error}", path=folder) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _let_others_read(folder: Path) -> None:
    """safetensors makes files that their owner alone can read."""
    readers = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(readers)
