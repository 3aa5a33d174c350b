"""A folder's files of weights as one source: which of them belong together, and whether all are there.

safetensors are taken before torch's own files, these before Meta's `consolidated.*.pth`. What names the
tensors have is another matter: layouts.py.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torchtune.checkpoint.headers import (
    TensorHeader,
    WeightSource,
    read_json,
    read_safetensors_header,
    read_safetensors_places,
)
from torchtune.checkpoint.meta_shards import ConsolidatedShards
from torchtune.checkpoint.pickles import SUFFIXES, PickleFile, read_pickle_header
from torchtune.checkpoint.tensor_file import TensorFile
from torchtune.distributed.part import Part
from torchtune.errors import CheckpointError, UnsupportedError

logger = logging.getLogger(__name__)

SAFETENSORS = ".safetensors"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# A file that wins over all others of its kind, and an index that wins over that.
PREFERRED = {SAFETENSORS: (SINGLE, INDEX), ".bin": ("pytorch_model.bin", "pytorch_model.bin.index.json")}

ADAPTER = re.compile(r"adapter_\w+\.(safetensors|bin|pt)")
# What trainers keep beside the weights.
NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|recipe_state|random_states)[\w.-]*")
CONSOLIDATED = re.compile(r"consolidated(\.(?P<number>\d+))?\.\w+")
NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.\w+")
# The first library, before its release 0.5: hf_model_0001_0.pt is part 1 of epoch 0.
EPOCH = re.compile(r"(?P<stem>(hf|meta|torchtune)_model)(_(?P<number>\d{4}))?_(?P<epoch>\d+)\.pt")


def writing_rank(name: str, num_ranks: int) -> int:
    """Which of so many ranks writes a file of this name: those of a numbered set in turn, all others the first."""
    match = NUMBERED.fullmatch(Path(name).name)
    return (int(match["number"]) - 1) % num_ranks if match else 0


@dataclass(frozen=True)
class FileSet:
    """Files that hold one model's weights.

    Attributes:
        files: all of them, in order.
        index: the index that says which tensor is in which of them.
    """

    files: tuple[Path, ...]
    index: Path | None = None

    def __str__(self) -> str:
        return self.index.name if self.index else self.files[0].name


class WeightFiles(WeightSource):
    """The tensors of files, read one at a time, in the type that they are saved in.

    Args:
        headers: the tensors, each with the file that it is in.
    """

    def __init__(self, headers: dict[str, TensorHeader]) -> None:
        self.headers = headers
        self._open: dict[Path, TensorFile | PickleFile] = {}

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU."""
        return self._file_of(name).read(name)

    def read_part(self, name: str, part: Part) -> Tensor:
        """A part of one tensor; where it lies in the file as in memory, no more than it is read."""
        return self.read(name) if part.is_whole else self._file_of(name).read_part(name, part)

    def read_into(self, into: Tensor, name: str, part: Part) -> None:
        """Fill a tensor of the part's shape; nothing else of its size is in memory."""
        self._file_of(name).read_into(into, name, part)

    def are_equal(self, one: str, two: str) -> bool:
        """Whether two tensors are the same; where their first rows differ, no more is read of a mapped file."""
        if self.headers[one] != self.headers[two]:
            return False
        file = self._file_of(one)
        a, b = (file.peek(name) if isinstance(file, PickleFile) else file.read(name) for name in (one, two))
        return torch.equal(a[:1], b[:1]) and torch.equal(a, b)

    def close(self) -> None:
        """Let go of the files."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _file_of(self, name: str) -> TensorFile | PickleFile:
        path = self.headers[name].file
        if path not in self._open:
            self._open[path] = (
                TensorFile(path, read_safetensors_places(path)) if path.suffix == SAFETENSORS else PickleFile(path)
            )
        return self._open[path]


def open_weights(folder: Path, named: Path | None = None) -> WeightSource:
    """The weights of a folder under the names that they have in its files; headers alone are read.

    Args:
        named: one of its files, where it is this that was asked for; the others of its set are read with it.
    Raises:
        CheckpointError: files are missing, cut, doubtful, or disagree with the index; names file and tensor.
        UnsupportedError: there is nothing but an adapter.
    """
    chosen = _chosen(folder, named)
    if chosen.index is not None:
        return WeightFiles(_indexed_headers(chosen.index))
    if len(chosen.files) > 1 and CONSOLIDATED.fullmatch(chosen.files[0].name):
        return ConsolidatedShards([WeightFiles(_read_header(file)) for file in chosen.files])
    return WeightFiles(_merged_headers(chosen.files))


def open_files(files: Sequence[Path]) -> WeightSource:
    """Files that are known to be one set, an adapter's for instance.

    Raises:
        CheckpointError: one is cut or damaged.
    """
    return WeightFiles(_merged_headers(files))


def _chosen(folder: Path, named: Path | None) -> FileSet:
    if named is not None and named.suffix not in (SAFETENSORS, *SUFFIXES):
        raise CheckpointError("is neither a folder nor a file of weights (.safetensors, .gguf, .bin, .pt)", path=named)
    if named is not None and ADAPTER.fullmatch(named.name):
        raise UnsupportedError(f"{named} is an adapter; name the checkpoint that it belongs to")
    files = sorted(file for file in folder.iterdir() if file.suffix in (SAFETENSORS, *SUFFIXES))
    weights = [file for file in files if not ADAPTER.fullmatch(file.name) and not NO_WEIGHTS.fullmatch(file.name)]
    kinds = [sets for sets in _kinds(folder, weights) if sets]
    if named is not None:
        return next((found for sets in kinds for found in sets if named in found.files), FileSet((named,)))
    if not kinds:
        if adapters := [file.name for file in files if ADAPTER.fullmatch(file.name)]:
            raise UnsupportedError(
                f"{folder} holds an adapter alone ({adapters[0]}); name the checkpoint it belongs to"
            )
        raise CheckpointError(f"holds no weights: neither {SINGLE} nor {INDEX}, nor another file of them", path=folder)
    found, *others = kinds
    if len(found) > 1:
        names = ", ".join(str(entry) for entry in found)
        raise CheckpointError(f"has several files of weights and no index: {names}; name one of them", path=folder)
    if others:
        left = ", ".join(str(entry) for sets in others for entry in sets)
        logger.warning("%s: the weights are read from %s; not from %s beside it", folder, found[0], left)
    return found[0]


def _kinds(folder: Path, weights: Sequence[Path]) -> list[list[FileSet]]:
    """The sets of each kind, the preferred kind first; more than one set of a kind leaves it open which is meant."""
    consolidated = [file for file in weights if CONSOLIDATED.fullmatch(file.name)]
    rest = [file for file in weights if file not in consolidated]
    safetensors = [file for file in rest if file.suffix == SAFETENSORS]
    pickles = [file for file in rest if file.suffix != SAFETENSORS]
    return [
        _sets(folder, safetensors, *PREFERRED[SAFETENSORS]),
        _sets(folder, pickles, *PREFERRED[".bin"]),
        _grouped([file for file in consolidated if file.suffix == SAFETENSORS]),
        _grouped([file for file in consolidated if file.suffix != SAFETENSORS]),
    ]


def _sets(folder: Path, files: Sequence[Path], single: str, index: str) -> list[FileSet]:
    if (folder / index).exists():
        return [
            FileSet(tuple(folder / name for name in sorted(set(_weight_map(folder / index).values()))), folder / index)
        ]
    if folder / single in files:
        return [FileSet((folder / single,))]
    return _grouped(files)


def _grouped(files: Sequence[Path]) -> list[FileSet]:
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(_group(file), []).append(file)
    for group in groups.values():
        _check_all_parts(group)
    return [FileSet(tuple(group)) for group in groups.values()]


def _group(file: Path) -> str:
    if match := NUMBERED.fullmatch(file.name):
        return f"{match['stem']} of {match['count']}{file.suffix}"
    if match := EPOCH.fullmatch(file.name):
        return f"{match['stem']} {match['epoch']}"
    return "consolidated" if CONSOLIDATED.fullmatch(file.name) else file.name


def _check_all_parts(group: Sequence[Path]) -> None:
    """Where the names count, none may be left out."""
    matches = [
        match for file in group for kind in (NUMBERED, EPOCH, CONSOLIDATED) if (match := kind.fullmatch(file.name))
    ]
    numbers = {int(match["number"]) for match in matches if match["number"]}
    if not numbers:
        return
    first = 0 if CONSOLIDATED.fullmatch(group[0].name) else 1
    last = int(matches[0]["count"]) if matches[0].re is NUMBERED else max(numbers)
    if missing := sorted(set(range(first, last + 1)) - numbers):
        raise CheckpointError(
            f"belongs to a set of {last - first + 1} files, of which number {missing[0]} is missing. Download it again",
            path=group[0],
        )


def _read_header(file: Path) -> dict[str, TensorHeader]:
    return read_safetensors_header(file) if file.suffix == SAFETENSORS else read_pickle_header(file)


def _merged_headers(files: Sequence[Path]) -> dict[str, TensorHeader]:
    headers: dict[str, TensorHeader] = {}
    for file in files:
        found = _read_header(file)
        if twice := sorted(set(found) & set(headers)):
            raise CheckpointError(
                f"holds the tensor '{twice[0]}', which {headers[twice[0]].file.name} has too", path=file
            )
        headers |= found
    return headers


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError("has no 'weight_map' from tensors to files", path=index)
    return weight_map


def _indexed_headers(index: Path) -> dict[str, TensorHeader]:
    weight_map = _weight_map(index)
    found: dict[str, TensorHeader] = {}
    shards: dict[str, dict[str, TensorHeader]] = {}
    for file_name in sorted(set(weight_map.values())):
        names = [name for name, file in weight_map.items() if file == file_name]
        file = index.parent / file_name
        if Path(file_name).name != file_name:
            raise CheckpointError(f"names the file '{file_name}', which is outside its folder", path=index)
        if not file.exists():
            raise CheckpointError(
                f"names {file_name}, which is missing; it holds {len(names)} tensors, '{names[0]}' among them. "
                "Download it again",
                path=index,
            )
        shards[file_name] = _read_header(file)
        if absent := sorted(set(names) - set(shards[file_name])):
            raise CheckpointError(f"says that {file_name} holds '{absent[0]}', which it does not", path=index)
        found.update({name: shards[file_name][name] for name in names})
    for file_name, shard in shards.items():
        if twice := sorted(name for name in shard if weight_map.get(name, file_name) != file_name):
            raise CheckpointError(
                f"says that {weight_map[twice[0]]} holds '{twice[0]}', and {file_name} holds it too", path=index
            )
        if unnamed := sorted(set(shard) - set(weight_map)):
            logger.warning("%s: %s holds '%s', which is not in it and not read", index, file_name, unnamed[0])
    return found
