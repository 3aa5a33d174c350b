"""A GGUF file: header and tensors, under its own names. What they are to a model is in gguf_layout.py.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is read here, since the
`gguf` library takes seconds for a large vocabulary; that library dequantises and knows the names.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchtune.errors import CheckpointError, MissingDependencyError, UnsupportedError

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
F32 = 0
MAX_DIMS = 4
SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor's place.

    Attributes:
        shape: as torch counts it, the contiguous dimension last.
        kind: the number of its ggml type.
        start: its first byte in `file`.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    file: Path
    start: int


class GGUFHeader(ABC):
    """What a GGUF file says, whether it is there or about to be written.

    Attributes:
        path: for messages.
        metadata: the key-value pairs.
        tensors: by name.
        keys_read: what has been asked for of the architecture's keys.
        library: `gguf`, with its tables of kinds and names.

    Raises:
        MissingDependencyError: the `gguf` library is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = gguf_library()
        self.metadata: Mapping[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        self.keys_read: set[str] = set()

    @property
    def architecture(self) -> str:
        """The name under which its model's keys stand."""
        return str(self.metadata.get("general.architecture"))

    @property
    def is_float32(self) -> bool:
        """Whether nothing in it is narrower."""
        return all(tensor.kind == F32 for tensor in self.tensors.values())

    def get(self, key: str, default: Any = None) -> Any:
        """A key of the file's architecture."""
        self.keys_read.add(key)
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def need(self, key: str) -> Any:
        """A key of the file's architecture that has no default.

        Raises:
            CheckpointError: it is not there.
        """
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"its metadata has no '{self.architecture}.{key}'", path=self.path)
        return value

    @abstractmethod
    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """A tensor as float32, dequantised; writable memory of its own.

        Args:
            index: of the first dimension, to read no more than that: one expert of all.
        """


class GGUFFile(GGUFHeader):
    """A GGUF file, or a set of split ones where one of them is named; the set's first file has the metadata.

    Raises:
        CheckpointError: a file is cut, damaged, no GGUF file, or absent from its set.
        UnsupportedError: a version or a quantisation that can't be read; names the tensor and the kind.
        MissingDependencyError: the `gguf` library is not there.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._data: dict[Path, mmap.mmap | bytes] = {}
        pairs = [self._parse(part) for part in _parts_of(path)]
        self.metadata = pairs[0]
        self._check_set(len(pairs))
        self._check_kinds()

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """A tensor as float32, dequantised; writable memory of its own."""
        tensor = self.tensors[name]
        shape = tensor.shape if index is None else tensor.shape[1:]
        row_bytes, num_rows = self._num_bytes(tensor.kind, tensor.shape[-1:]), math.prod(shape[:-1])
        start = tensor.start + (0 if index is None else index * num_rows * row_bytes)
        raw = np.frombuffer(self._data[tensor.file], np.uint8, num_rows * row_bytes, start).reshape(num_rows, row_bytes)
        # The library goes a few rows at a time, so that nothing but the result is large.
        values = self.library.quants.dequantize(raw, self.library.GGMLQuantizationType(tensor.kind)).reshape(shape)
        return values if values.flags.writeable else values.copy()

    def _parse(self, path: Path) -> dict[str, Any]:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
        if data[:4] != b"GGUF":
            raise CheckpointError("is no GGUF file", path=path)
        self._data[path] = data
        reader = _Reader(data, path)
        version = reader.scalar("I", at=4)
        if version not in (2, 3):
            raise UnsupportedError(f"{path}: GGUF version {version} is not supported; versions 2 and 3 are")
        num_tensors, num_pairs = reader.scalar("Q"), reader.scalar("Q")
        metadata = {}
        for _ in range(num_pairs):
            key = reader.string()
            metadata[key] = reader.value(reader.scalar("I"))
        entries = [(reader.string(), reader.dims(), reader.scalar("I"), reader.scalar("Q")) for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise CheckpointError(f"its general.alignment is {alignment!r}", path=path)
        data_start = -(-reader.position // alignment) * alignment
        for name, dims, kind, offset in entries:
            tensor = GGUFTensor(name, tuple(reversed(dims)), kind, path, data_start + offset)
            end = tensor.start + self._tensor_bytes(tensor)
            if end > len(data):
                raise CheckpointError(
                    f"it has {len(data)} bytes where tensor '{name}' ends at {end}; download it again", path=path
                )
            if name in self.tensors:
                raise CheckpointError(f"tensor '{name}' is there twice", path=path)
            self.tensors[name] = tensor
        return metadata

    def _check_set(self, num_files: int) -> None:
        count = self.metadata.get("split.count", 1)
        if count > 1 and num_files != count:
            raise CheckpointError(
                f"is one of {count} files; the set is read when they lie in one folder under their first names, "
                f"'NAME-00001-of-{count:05}.gguf' and so on",
                path=self.path,
            )
        expected = self.metadata.get("split.tensors.count", len(self.tensors))
        if expected != len(self.tensors):
            raise CheckpointError(
                f"says that there are {expected} tensors in all its parts, which have {len(self.tensors)}",
                path=self.path,
            )

    def _check_kinds(self) -> None:
        """Have one block of each kind dequantised, so that one that can't be is known before weights are read."""
        for kind, tensor in {tensor.kind: tensor for tensor in self.tensors.values()}.items():
            known = self.library.GGMLQuantizationType(kind)
            _, block_bytes = self.library.GGML_QUANT_SIZES[known]
            try:
                self.library.quants.dequantize(np.zeros((1, block_bytes), np.uint8), known)
            except NotImplementedError as error:
                raise UnsupportedError(
                    f"{self.path}: tensor '{tensor.name}' is of kind {known.name}, which the gguf library "
                    "can't dequantise"
                ) from error

    def _tensor_bytes(self, tensor: GGUFTensor) -> int:
        try:
            block, _ = self.library.GGML_QUANT_SIZES[self.library.GGMLQuantizationType(tensor.kind)]
        except (ValueError, KeyError) as error:
            raise UnsupportedError(
                f"{tensor.file}: tensor '{tensor.name}' has the quantisation {tensor.kind}, which the installed gguf "
                "library does not know"
            ) from error
        if tensor.shape[-1] % block:
            raise CheckpointError(
                f"tensor '{tensor.name}' has rows of {tensor.shape[-1]} elements in blocks of {block}",
                path=tensor.file,
            )
        return self._num_bytes(tensor.kind, tensor.shape)

    def _num_bytes(self, kind: int, shape: tuple[int, ...]) -> int:
        block, block_bytes = self.library.GGML_QUANT_SIZES[self.library.GGMLQuantizationType(kind)]
        return math.prod(shape) // block * int(block_bytes)


class _Reader:
    """Walks along the header's bytes."""

    def __init__(self, data: mmap.mmap | bytes, path: Path) -> None:
        self.data = data
        self.path = path
        self.position = 0

    def scalar(self, code: str, at: int | None = None) -> Any:
        self.position = self.position if at is None else at
        (value,) = struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))
        return value

    def string(self) -> str:
        try:
            return self._take(self.scalar("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"its header is damaged ({error})", path=self.path) from error

    def dims(self) -> tuple[int, ...]:
        """The sizes of a tensor as ggml counts them: the contiguous one first."""
        num_dims = self.scalar("I")
        if not 1 <= num_dims <= MAX_DIMS:
            raise CheckpointError(f"its header is damaged: a tensor of {num_dims} dimensions", path=self.path)
        sizes = tuple(self.scalar("Q") for _ in range(num_dims))
        if 0 in sizes:
            raise CheckpointError(f"its header is damaged: a tensor of the sizes {sizes}", path=self.path)
        return sizes

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.scalar(self._code(kind))
        item, length = self.scalar("I"), self.scalar("Q")
        if item == STRING:
            return [self.string() for _ in range(length)]
        size = struct.calcsize("<" + self._code(item))
        return list(struct.unpack(f"<{length}{self._code(item)}", self._take(length * size)))

    def _code(self, kind: int) -> str:
        if kind not in SCALARS:
            raise CheckpointError(f"its header is damaged: a value of kind {kind}", path=self.path)
        return SCALARS[kind]

    def _take(self, num_bytes: int) -> bytes:
        start, self.position = self.position, self.position + num_bytes
        if self.position > len(self.data):
            raise CheckpointError(f"ends at {len(self.data)} bytes, within its header", path=self.path)
        return self.data[start : self.position]


def _parts_of(path: Path) -> list[Path]:
    """The files of the set that `path` is of, the first one first."""
    match = SPLIT_NAME.fullmatch(path.name)
    if not match:
        return [path]
    count = int(match["count"])
    parts = [path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    absent = [part.name for part in parts if not part.exists()]
    if absent:
        raise CheckpointError(f"is one of {count} files, of which {', '.join(absent[:5])} is missing", path=path)
    return parts


def gguf_library() -> Any:
    """The `gguf` library, with its part that quantises.

    Raises:
        MissingDependencyError: it is not there.
    """
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise MissingDependencyError("gguf", extra="gguf", needed_for="a GGUF checkpoint") from error
    return gguf
