"""Headers of safetensors files: what is in them and whether all of it is there, without reading a weight.

Format: https://huggingface.co/docs/safetensors (eight bytes of header length, a JSON header, the data).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import torch

from torchtune.distributed.part import Part
from torchtune.errors import CheckpointError

MAX_HEADER_BYTES = 100 * 2**20

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
GIT_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorHeader:
    """What a file says of a tensor.

    Attributes:
        shape: its dims.
        dtype: the type that it is saved in, and is to be saved in again.
        file: where it lies.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path


class WeightSource(Protocol):
    """Where tensors are read from, one at a time."""

    headers: dict[str, TensorHeader]

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, in memory that is the caller's: it may be kept, and changed in place."""

    def read_part(self, name: str, part: Part) -> torch.Tensor:
        """A part of one; where it can't be read by itself, the whole is for a moment in memory."""
        whole = self.read(name)
        return whole if part.is_whole else part.of(whole).clone(memory_format=torch.contiguous_format)

    def read_into(self, into: torch.Tensor, name: str, part: Part) -> None:
        """Fill a tensor of the part's shape, of any type, layout and device."""
        into.copy_(self.read_part(name, part))

    def close(self) -> None:
        """Let go of the files."""


def read_safetensors_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: as `read_safetensors_places`.
    """
    return {name: header for name, (header, _) in read_safetensors_places(path).items()}


def read_safetensors_places(path: Path) -> dict[str, tuple[TensorHeader, int]]:
    """The tensors of a safetensors file, and the byte at which each begins.

    Raises:
        CheckpointError: the file is cut, empty or no safetensors file (says its size and what it should be), or its
            header contradicts itself (names the tensor).
    """
    refuse_lfs_pointer(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MAX_HEADER_BYTES or length > size - 8:
            raise CheckpointError(f"{size} bytes are no complete safetensors file; download it again", path=path)
        try:
            header = json.loads(file.read(length), object_pairs_hook=_each_once)
        except ValueError as error:
            raise CheckpointError(f"its header is damaged ({error}); download it again", path=path) from error
    if not isinstance(header, dict):
        raise CheckpointError("its header is damaged (no object); download it again", path=path)
    header.pop("__metadata__", None)
    found = {name: _tensor_header(name, entry, path) for name, entry in header.items()}
    extents = {name: (int(entry["data_offsets"][0]), int(entry["data_offsets"][1])) for name, entry in header.items()}
    _check_size(path, size, 8 + length, extents)
    _check_extents(path, found, extents)
    return {name: (tensor, 8 + length + extents[name][0]) for name, tensor in found.items()}


def refuse_lfs_pointer(path: Path) -> None:
    """Tell a file that git-lfs has not fetched from one that is damaged.

    Raises:
        CheckpointError: it is such a pointer.
    """
    with path.open("rb") as file:
        if file.read(len(GIT_LFS_POINTER)) == GIT_LFS_POINTER:
            raise CheckpointError("is a pointer of git-lfs, not the file itself; run `git lfs pull`", path=path)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(name for name in found if names.count(name) > 1)}' is there twice")
    return found


def _tensor_header(name: str, entry: Any, path: Path) -> TensorHeader:
    shape, dtype, offsets = (
        (entry.get(key) for key in ("shape", "dtype", "data_offsets")) if isinstance(entry, dict) else (None,) * 3
    )
    if not (_are_counts(shape) and _are_counts(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise CheckpointError(f"its header is damaged: tensor '{name}' is said to be {entry}", path=path)
    if dtype not in DTYPES:
        raise CheckpointError(f"tensor '{name}' has the type {dtype}, which is not supported", path=path)
    return TensorHeader(tuple(shape), DTYPES[dtype], path)


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_size(path: Path, size: int, start: int, extents: Mapping[str, tuple[int, int]]) -> None:
    end = start + max((end for _, end in extents.values()), default=0)
    if size == end:
        return
    cut = [name for name, extent in extents.items() if start + extent[1] > size]
    lost = f" tensor '{cut[0]}'{f' and {len(cut) - 1} more are' if len(cut) > 1 else ' is'} cut off;" if cut else ""
    raise CheckpointError(f"it has {size} bytes where its header says {end};{lost} download it again", path=path)


def _check_extents(path: Path, tensors: Mapping[str, TensorHeader], extents: Mapping[str, tuple[int, int]]) -> None:
    """Each tensor takes the bytes of its shape and type, and they lie one after the other."""
    before, position = "", 0
    for name, (start, end) in sorted(extents.items(), key=lambda item: item[1]):
        header = tensors[name]
        needed = math.prod(header.shape) * header.dtype.itemsize
        if end - start != needed:
            raise CheckpointError(
                f"tensor '{name}' {header.shape} of {header.dtype} takes {needed} bytes, its header gives it "
                f"{end - start}",
                path=path,
            )
        if start < position:
            raise CheckpointError(f"tensors '{before}' and '{name}' overlap by {position - start} bytes", path=path)
        if start > position:
            raise CheckpointError(f"{start - position} bytes before tensor '{name}' belong to none", path=path)
        before, position = name, end


def read_json(path: Path) -> dict[str, Any]:
    """The keys and values of a JSON file, read as UTF-8 whatever the locale.

    Raises:
        CheckpointError: it is not there, no JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError("is missing", path=path) from error
    except ValueError as error:
        raise CheckpointError(f"is no JSON: {error}", path=path) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"holds a {type(content).__name__}, not keys and values", path=path)
    return content
