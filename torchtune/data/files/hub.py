"""Data sets by hub id, through the `datasets` library."""

from __future__ import annotations

from pathlib import Path

from torchtune.data.files.cache import cache_folder
from torchtune.data.files.tables import saved_dataset
from torchtune.errors import DataError, MissingDependencyError


def hub_files(repo_id: str, *, subset: str | None, split: str) -> list[Path]:
    """The Arrow files of a split, in order; downloaded into the cache of `datasets`.

    Args:
        repo_id: `org/name`, or `org/name@revision`.
        subset: one of its configurations, where it has several.
        split: its name, or a part of it as `datasets` writes it (`train[:10%]`).
    Raises:
        DataError: the hub can't be reached, or has no such data set, subset or split.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingDependencyError("datasets", extra="datasets", needed_for=f"the data set {repo_id}") from error
    name, _, revision = repo_id.partition("@")
    try:
        loaded = load_dataset(name, subset, split=split, revision=revision or None)
    except Exception as error:  # the library raises what its parts raise
        message = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"can't be loaded from the hub: {message}", source=repo_id) from error
    files = [Path(entry["filename"]) for entry in loaded.cache_files]
    if files and "[" not in split:
        return files
    # A part of a split is a view, and a small data set may lie in memory; both are written out.
    folder = cache_folder() / "hub" / loaded._fingerprint
    if not (folder / "state.json").exists():
        loaded.save_to_disk(str(folder))
    return saved_dataset(folder, None) or []
