"""Checkpoints of a run, OUT/step_N/: each is whole or absent.

A step is written into a hidden folder beside, every file is flushed to the disk, a manifest of sizes and
checksums is written last, and the folder is renamed. What a kill leaves behind is hidden, is never taken
for a checkpoint, and is removed by the next write. Where there are several ranks each flushes and sums up the
files that it has written, and the first does the rest.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from torchtune.checkpoint.folder import writing_rank
from torchtune.checkpoint.headers import read_json, read_safetensors_header
from torchtune.distributed.peers import Attempt, Peers
from torchtune.errors import CheckpointError, RankError

MANIFEST = "manifest.json"
BEST = "best"
STEP = re.compile(r"step_(\d+)")
HIDDEN = ".step_"
BLOCK_BYTES = 2**20


def write_step(output_dir: Path, step: int, write: Callable[[Path], None], *, peers: Peers | None = None) -> Path:
    """Write OUT/step_N/, whole or not at all. Every rank calls it, and sees to the files that it writes.

    Args:
        write: puts the files into the folder that it is given; `writing_rank` says whose a file is.
        peers: the ranks that take part; by default there is this one.
    Returns:
        The finished folder.
    Raises:
        CheckpointError: the disk is full or the folder can't be written, on whichever rank, which is named; earlier
            checkpoints are untouched.
    """
    peers = peers or Peers()
    final = output_dir / f"step_{step}"
    beside = output_dir / f"{HIDDEN}{step}.writing"
    try:
        _write_step(final, beside, write, peers)
    except RankError as error:
        _remove(beside, peers)
        raise CheckpointError(str(error), path=final) from error
    except Exception as error:
        is_known = isinstance(error, (OSError, SafetensorError))
        reason = _reason(error, output_dir) if is_known else f"{type(error).__name__}: {error}"
        peers.tell(reason)
        _remove(beside, peers)
        if not is_known:
            raise
        raise CheckpointError(reason if peers.size == 1 else f"rank {peers.rank}: {reason}", path=final) from error
    return final


def _write_step(final: Path, beside: Path, write: Callable[[Path], None], peers: Peers) -> None:
    output_dir = final.parent
    if peers.is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output_dir)
        beside.mkdir()
    peers.meet()
    write(beside)
    entries = peers.gather(_seal(beside, [file for file in _files(beside) if _is_of(file, peers)]))
    if peers.is_main:
        _write_manifest(beside, {name: entry for of_rank in entries for name, entry in of_rank.items()})
        if final.exists():
            final.rename(output_dir / f"{HIDDEN}{final.name.removeprefix('step_')}.replaced")
        beside.rename(final)
        _flush_folder(output_dir)
        _remove_leftovers(output_dir)
    peers.meet()


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


def verify_step(path: Path, peers: Peers | None = None) -> None:
    """Read a checkpoint whole and compare it with its manifest; ranks share the files, and all of them call it.

    Raises:
        CheckpointError: names the file that is missing, cut or changed.
        RankError: another rank has found it.
    """
    peers = peers or Peers()
    attempt = Attempt()
    attempt(_verify, path, peers)
    if attempt.error is not None:
        peers.tell(str(attempt.error))
    attempt.finish()
    peers.meet()


def _verify(path: Path, peers: Peers) -> None:
    manifest = read_json(path / MANIFEST)["files"]
    for name, entry in manifest.items():
        file = path / name
        if not file.exists():
            raise CheckpointError("is missing, but the checkpoint's manifest names it", path=file)
        if file.stat().st_size != entry["bytes"]:
            raise CheckpointError(f"has {file.stat().st_size} bytes where it had {entry['bytes']}", path=file)
    mine = sorted(manifest, key=lambda name: manifest[name]["bytes"])[peers.rank :: peers.size]
    for name, found in zip(mine, _checksums([path / name for name in mine]), strict=True):
        if found != manifest[name]["sha256"]:
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


def _files(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.rglob("*") if entry.is_file())


def _is_of(file: Path, peers: Peers) -> bool:
    return writing_rank(file.name, peers.size) == peers.rank


def _seal(folder: Path, files: list[Path]) -> dict[str, dict[str, Any]]:
    """Flush files, check that each is readable, and return what the manifest says of them."""
    readers = folder.stat().st_mode & 0o666  # whoever may read the folder
    for file in files:
        file.chmod(readers)
        _flush(file)
        if file.suffix == ".safetensors":
            read_safetensors_header(file)
    return {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": digest}
        for file, digest in zip(files, _checksums(files), strict=True)
    }


def _write_manifest(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """The manifest, last, and everything flushed to the disk."""
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": dict(sorted(entries.items()))}, indent=1), encoding="utf-8")
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


def _remove(beside: Path, peers: Peers) -> None:
    """What could not be finished, of which no rank writes any more."""
    if peers.is_main:
        shutil.rmtree(beside, ignore_errors=True)


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
