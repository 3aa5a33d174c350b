"""Checkpoints of a run, OUT/step_N/: each is whole or absent.

A step is written into a hidden folder beside, every file is flushed to the disk, a manifest of sizes and
checksums is written last, and the folder is renamed. What a kill leaves behind is hidden, is never taken
for a checkpoint, and is removed by the next write.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError

from torchtune.checkpoint.headers import read_json, read_safetensors_header
from torchtune.errors import CheckpointError

MANIFEST = "manifest.json"
BEST = "best"
STEP = re.compile(r"step_(\d+)")
HIDDEN = ".step_"
BLOCK_BYTES = 8 * 2**20


def write_step(output_dir: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Write OUT/step_N/, whole or not at all.

    Args:
        write: puts the files into the folder that it is given.
    Returns:
        The finished folder.
    Raises:
        CheckpointError: the disk is full or the folder can't be written; earlier checkpoints are untouched.
    """
    final = output_dir / f"step_{step}"
    beside = output_dir / f"{HIDDEN}{step}.writing"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output_dir)
        beside.mkdir()
        write(beside)
        _seal(beside)
        if final.exists():
            final.rename(output_dir / f"{HIDDEN}{step}.replaced")
        beside.rename(final)
        _flush_folder(output_dir)
        _remove_leftovers(output_dir)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(_reason(error, output_dir), path=final) from error
    return final


def complete_steps(output_dir: Path) -> list[int]:
    """The steps of complete checkpoints, rising. Sizes are compared with the manifest, contents are not read."""
    if not output_dir.is_dir():
        return []
    found = [(int(match[1]), entry) for entry in output_dir.iterdir() if (match := STEP.fullmatch(entry.name))]
    return sorted(step for step, entry in found if _has_all_files(entry))


def newest_step(output_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, if it has one."""
    steps = complete_steps(output_dir)
    return output_dir / f"step_{steps[-1]}" if steps else None


def verify_step(path: Path) -> None:
    """Read a checkpoint whole and compare it with its manifest.

    Raises:
        CheckpointError: names the file that is missing, cut or changed.
    """
    manifest = read_json(path / MANIFEST)["files"]
    for name, entry in manifest.items():
        file = path / name
        if not file.exists():
            raise CheckpointError("is missing, but the checkpoint's manifest names it", path=file)
        if file.stat().st_size != entry["bytes"]:
            raise CheckpointError(f"has {file.stat().st_size} bytes where it had {entry['bytes']}", path=file)
    sums = _checksums([path / name for name in manifest])
    for (name, entry), found in zip(manifest.items(), sums, strict=True):
        if found != entry["sha256"]:
            raise CheckpointError(
                "has changed since it was written: its checksum is another; go on from an earlier checkpoint",
                path=path / name,
            )


def prune_steps(output_dir: Path, keep_last: int | None, keep: Collection[int] = ()) -> None:
    """Remove all complete checkpoints but the newest `keep_last` (None: all) and the steps in `keep`."""
    if keep_last is None:
        return
    for step in complete_steps(output_dir)[:-keep_last]:
        if step not in keep:
            # Renamed first, so that a kill in the middle does not leave half a checkpoint under its name.
            hidden = output_dir / f"{HIDDEN}{step}.removed"
            (output_dir / f"step_{step}").rename(hidden)
            shutil.rmtree(hidden)


def mark_best(output_dir: Path, step: int) -> None:
    """Point OUT/best at a step's folder."""
    beside = output_dir / f".{BEST}"
    beside.unlink(missing_ok=True)
    beside.symlink_to(f"step_{step}")
    best = output_dir / BEST
    if best.is_dir() and not best.is_symlink():
        # A copy of the run that made a folder of the link; what it holds may be the only copy of that step.
        best.rename(output_dir / f"{BEST}.copied-{time.strftime('%Y%m%d-%H%M%S')}")
    os.replace(beside, best)


def _seal(folder: Path) -> None:
    """Flush every file, check that each is readable, and write the manifest last."""
    files = sorted(entry for entry in folder.rglob("*") if entry.is_file())
    readers = folder.stat().st_mode & 0o666  # safetensors makes files that their owner alone can read
    for file in files:
        file.chmod(readers)
        _flush(file)
        if file.suffix == ".safetensors":
            read_safetensors_header(file)
    sums = _checksums(files)
    entries = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": digest}
        for file, digest in zip(files, sums, strict=True)
    }
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": entries}, indent=1), encoding="utf-8")
    _flush(manifest)
    for inner in [entry for entry in folder.rglob("*") if entry.is_dir()]:
        _flush_folder(inner)
    _flush_folder(folder)


def _checksums(files: list[Path]) -> list[str]:
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(_checksum, files))


def _checksum(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _has_all_files(folder: Path) -> bool:
    if not (folder / MANIFEST).exists():
        return False
    entries = read_json(folder / MANIFEST)["files"]
    return all(
        (folder / name).exists() and (folder / name).stat().st_size == entry["bytes"] for name, entry in entries.items()
    )


def _remove_leftovers(output_dir: Path) -> None:
    for entry in output_dir.glob(f"{HIDDEN}*"):
        shutil.rmtree(entry)


def _flush(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: Exception, output_dir: Path) -> str:
    kept = "Earlier checkpoints are untouched."
    existing = next(parent for parent in [output_dir, *output_dir.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return f"the disk is full ({free / 1e9:.2f} GB free). Free some space, or lower keep_last. {kept}"
    return f"can't be written: {error} ({free / 1e9:.2f} GB free). {kept}"
