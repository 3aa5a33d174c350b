"""A GGUF file written a tensor at a time, in any order: the header first, and then each tensor at its place.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3. The reader is in gguf.py.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from torchtune.checkpoint.gguf import ARRAY, STRING
from torchtune.checkpoint.gguf_write_types import GGUFType

VERSION, ALIGNMENT = 3, 32
UINT32, INT32, FLOAT32, BOOL = 4, 5, 6, 7


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor whose values are not known yet.

    Attributes:
        shape: as torch counts it, the contiguous dimension last.
        num_parts: how many pieces it is written in, along its first dimension.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGUFType
    num_parts: int = 1


class GGUFWriter:
    """An open file for tensors that are known by name, shape and type.

        with GGUFWriter(path, metadata, tensors, library) as file:
            file.write("token_embd.weight", data)

    Args:
        metadata: texts, flags, whole numbers, floats, and lists of these.
        library: `gguf`, for the sizes of blocks.
    """

    def __init__(
        self, path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, PlannedTensor], library: Any
    ) -> None:
        self._tensors, self._library = tensors, library
        self._places: dict[str, int] = {}
        entries, end = b"", 0
        for tensor in tensors.values():
            self._places[tensor.name] = end
            dims = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
            entries += _text(tensor.name) + dims + struct.pack("<IQ", tensor.kind.number(library), end)
            end = _aligned(end + self._num_bytes(tensor))
        pairs = b"".join(_text(key) + _value(value) for key, value in metadata.items())
        header = b"GGUF" + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)) + pairs + entries
        self._begin = _aligned(len(header))
        self._missing = {(tensor.name, part) for tensor in tensors.values() for part in range(tensor.num_parts)}
        self._file = path.open("wb", buffering=0)
        self._put(header.ljust(self._begin, b"\0"), 0)
        self._file.truncate(self._begin + end)

    def write(self, name: str, data: np.ndarray, part: int = 0) -> None:
        """The bytes of one tensor, or of a part of it."""
        tensor = self._tensors[name]
        num_bytes = self._num_bytes(tensor) // tensor.num_parts
        assert data.nbytes == num_bytes, f"'{name}' has {data.nbytes} bytes, not {num_bytes}"
        self._put(data.data, self._begin + self._places[name] + part * num_bytes)
        self._missing.remove((name, part))

    def close(self) -> None:
        """Close the file, which must be whole."""
        self._file.close()
        assert not self._missing, f"'{min(self._missing)}' was never written"

    def __enter__(self) -> GGUFWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()  # it will not be used

    def _num_bytes(self, tensor: PlannedTensor) -> int:
        return tensor.kind.num_bytes(math.prod(tensor.shape), self._library)

    def _put(self, data: bytes | memoryview, at: int) -> None:
        self._file.seek(at)
        rest = memoryview(data).cast("B")
        # Linux writes two gigabytes at most at a time.
        while rest:
            rest = rest[self._file.write(rest) :]


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    content = text.encode("utf-8")
    return struct.pack("<Q", len(content)) + content


def _value(value: Any) -> bytes:
    """A value after the number of its kind; whole numbers are 32 bits wide, in lists with a sign, as readers expect."""
    if isinstance(value, list):
        kind = _kind(value[0], in_list=True) if value else STRING
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + b"".join(_content(item, kind) for item in value)
    kind = _kind(value)
    return struct.pack("<I", kind) + _content(value, kind)


def _kind(value: Any, *, in_list: bool = False) -> int:
    kinds = {str: STRING, bool: BOOL, int: INT32 if in_list else UINT32, float: FLOAT32}
    return kinds[type(value)]


def _content(value: Any, kind: int) -> bytes:
    if kind == STRING:
        return _text(value)
    return struct.pack("<" + {BOOL: "?", UINT32: "I", INT32: "i", FLOAT32: "f"}[kind], value)
