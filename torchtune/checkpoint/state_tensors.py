"""Tensors of which ranks hold parts, as files from which any other number of ranks reads the parts that it needs.

    GROUP.safetensors                    of one rank: all tensors
    GROUP-00002-of-00004.safetensors     of several: what the second of four has written, parts under the wholes' names
    GROUP.index.json                     for each tensor its shape, and which part of it lies in which file

torch's own distributed checkpoint keeps its index as a pickle, which is never read here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchtune.checkpoint.folder import NUMBERED, SAFETENSORS
from torchtune.checkpoint.headers import TensorHeader, read_json, read_safetensors_places
from torchtune.checkpoint.tensor_file import TensorFile
from torchtune.checkpoint.tensor_writer import write_tensors
from torchtune.distributed.part import Part
from torchtune.distributed.peers import Peers
from torchtune.errors import CheckpointError, UnsupportedError

INDEX_SUFFIX = ".index.json"


def save_state_tensors(
    folder: Path, group: str, tensors: Mapping[str, Tensor], parts: Mapping[str, Part], peers: Peers
) -> None:
    """Write what the ranks hold. Every rank calls it; what several have, one of them writes, so that all have as much.

    Args:
        tensors: under names that end with that of a parameter, `exp_avg/NAME`; moved to the host one at a time.
        parts: which part of a parameter, by its name, this rank holds. What has its shape is that part of a whole.
    Raises:
        UnsupportedError: a tensor with other than a value for each element of a parameter that is split.
        RankError: another rank failed.
    """
    described = {key: (_part_of(key, tensor, parts), tensor.nbytes) for key, tensor in tensors.items()}
    everyones = peers.gather(described)
    writers = _writers(everyones)
    if not writers:
        return
    if peers.size == 1:
        write_tensors(folder / f"{group}{SAFETENSORS}", tensors)
        return
    mine = {key: tensor for key, tensor in tensors.items() if writers.get((key, described[key][0])) == peers.rank}
    if mine:
        write_tensors(folder / _file_name(group, peers.rank, peers.size), mine)
    if peers.is_main:
        index: dict[str, dict[str, Any]] = {}
        for (key, part), writer in writers.items():
            entry = index.setdefault(key, {"shape": part.whole, "pieces": []})
            entry["pieces"].append({"file": _file_name(group, writer, peers.size), "ranges": part.ranges})
        (folder / f"{group}{INDEX_SUFFIX}").write_text(json.dumps({"tensors": index}), encoding="utf-8")


class StateTensors(Mapping[str, Tensor]):
    """Tensors that are read when they are asked for, whole or in parts.

    Attributes:
        shapes: of the wholes.
    """

    def __init__(self, pieces: Mapping[str, list[_Piece]]) -> None:
        self._pieces = pieces
        self._places: dict[Path, dict[str, tuple[TensorHeader, int]]] = {}
        self.shapes = {key: found[0].part.whole for key, found in pieces.items()}

    def __getitem__(self, key: str) -> Tensor:
        return self.read_part(key, Part.all_of(self.shapes[key]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def read_part(self, key: str, part: Part) -> Tensor:
        """A part of a tensor, on the CPU; no more than it is read.

        Raises:
            CheckpointError: the files do not hold all of it.
        """
        first = self._pieces[key][0]
        held, num_read = torch.empty(part.shape, dtype=self._places_of(first.file, key)[key][0].dtype), 0
        for piece in self._pieces[key]:
            common = part.meet(piece.part)
            if common == part:
                return self._read(piece, key, common)
            if common.numel:
                read = self._read(piece, key, common)
                for mine, theirs in part.overlaps(common):
                    held[mine].copy_(read[theirs])
                num_read += common.numel
        if num_read != part.numel:
            raise CheckpointError(f"does not hold all of '{key}' {part.whole}", path=first.file.parent)
        return held

    def _read(self, piece: _Piece, key: str, part: Part) -> Tensor:
        file = TensorFile(piece.file, self._places_of(piece.file, key))
        try:
            return file.read_part(key, part.inside(piece.part))
        finally:
            file.close()

    def _places_of(self, file: Path, key: str) -> dict[str, tuple[TensorHeader, int]]:
        if file not in self._places:
            self._places[file] = read_safetensors_places(file)
        if key not in self._places[file]:
            raise CheckpointError(f"does not hold '{key}', as its index says", path=file)
        return self._places[file]


def open_state_tensors(folder: Path) -> dict[str, StateTensors]:
    """The groups of a folder, by name; headers and indices alone are read.

    Raises:
        CheckpointError: a file or an index is damaged.
    """
    found = dict[str, StateTensors]()
    for file in sorted(folder.glob(f"*{SAFETENSORS}")):
        if not NUMBERED.fullmatch(file.name):
            places = read_safetensors_places(file)
            pieces = {key: [_Piece(file, Part.all_of(header.shape))] for key, (header, _) in places.items()}
            found[file.stem] = StateTensors(pieces)
    for index in sorted(folder.glob(f"*{INDEX_SUFFIX}")):
        found[index.name.removesuffix(INDEX_SUFFIX)] = StateTensors(_indexed(index))
    return found


def shape_of(tensors: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    """The shape of the whole, of which nothing is read."""
    return tensors.shapes[key] if isinstance(tensors, StateTensors) else tuple(tensors[key].shape)


def read_part(tensors: Mapping[str, Tensor], key: str, part: Part) -> Tensor:
    """A part of a tensor, of which no more is read than that where it lies in a file."""
    return tensors.read_part(key, part) if isinstance(tensors, StateTensors) else part.of(tensors[key])


@dataclass(frozen=True)
class _Piece:
    """A part of a tensor, and the file that it lies in."""

    file: Path
    part: Part


def _part_of(key: str, tensor: Tensor, parts: Mapping[str, Part]) -> Part:
    """Which part of a whole a state is: its parameter's, where it has a value for each of its elements."""
    _, _, name = key.partition("/")
    part = parts.get(name) or parts.get(key) or Part.all_of(tensor.shape)
    if tensor.shape == part.shape:
        return part
    if not part.is_whole and tensor.numel() > 1:
        raise UnsupportedError(
            f"'{key}' {tuple(tensor.shape)} has no value for each element of '{name}' {part.shape}, of which a rank has "
            "a part: it can't be saved so that another number of ranks resumes from it"
        )
    return Part.all_of(tensor.shape)


def _writers(everyones: list[dict[str, tuple[Part, int]]]) -> dict[tuple[str, Part], int]:
    """Who writes each part: where several have it, the one that has least to write so far."""
    holders: dict[tuple[str, Part], list[int]] = {}
    num_bytes: dict[tuple[str, Part], int] = {}
    for rank, described in enumerate(everyones):
        for key, (part, size) in described.items():
            if part.numel:
                holders.setdefault((key, part), []).append(rank)
                num_bytes[key, part] = size
    written = [0] * len(everyones)
    writers: dict[tuple[str, Part], int] = {}
    for place in sorted(holders, key=lambda place: len(holders[place])):
        writers[place] = min(holders[place], key=lambda rank: written[rank])
        written[writers[place]] += num_bytes[place]
    return writers


def _file_name(group: str, rank: int, size: int) -> str:
    return f"{group}-{rank + 1:05}-of-{size:05}{SAFETENSORS}"


def _indexed(index: Path) -> dict[str, list[_Piece]]:
    content: Any = read_json(index).get("tensors")
    try:
        return {
            key: [
                _Piece(index.parent / Path(piece["file"]).name, _part(entry["shape"], piece["ranges"]))
                for piece in entry["pieces"]
            ]
            for key, entry in content.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"is damaged: {type(error).__name__} {error}", path=index) from error


def _part(shape: list[int], ranges: list[list[list[int]]]) -> Part:
    return Part(tuple(shape), tuple(tuple((start, end) for start, end in of_dim) for of_dim in ranges))
