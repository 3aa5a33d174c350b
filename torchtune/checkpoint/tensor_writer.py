"""A safetensors file written a tensor at a time, in any order: no more than one need be in memory.

The bytes are those that the safetensors library writes; it takes all tensors of a file at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from torchtune.checkpoint.headers import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Types in the order in which their tensors lie in a file, so that each begins at a multiple of its size.
ORDER = (
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)
Described = tuple[tuple[int, ...], torch.dtype]


class TensorWriter:
    """An open file for tensors of which names, shapes and types are known, the values not yet.

        with TensorWriter(path, {"a": ((2, 3), torch.float32)}) as file:
            file.write("a", tensor)

    Args:
        tensors: shape and type of each.
        metadata: texts that stand in the header.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Described], metadata: Mapping[str, str] | None = None) -> None:
        self._described = dict(tensors)
        self._places: dict[str, int] = {}
        header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
        end = 0
        for name in sorted(tensors, key=lambda name: (ORDER.index(NAMES[tensors[name][1]]), name.encode())):
            shape, dtype = tensors[name]
            start, end = end, end + math.prod(shape) * dtype.itemsize
            self._places[name] = start
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._begin = 8 + len(text)
        self._file = path.open("wb", buffering=0)
        self._put(len(text).to_bytes(8, "little") + text, 0)
        self._missing = set(tensors)

    def write(self, name: str, tensor: Tensor) -> None:
        """The values of one tensor, of the shape and type that were given for it, on any device."""
        assert (tuple(tensor.shape), tensor.dtype) == self._described[name], f"'{name}' is another than was said"
        values = tensor.detach().cpu().contiguous()
        if values.numel():
            self._put(values.view(-1).view(torch.uint8).numpy().data, self._begin + self._places[name])
        self._missing.discard(name)

    def close(self) -> None:
        """Close the file, which must be whole."""
        self._file.close()
        assert not self._missing, f"'{min(self._missing)}' was never written"

    def abandon(self) -> None:
        """Close the file as it is: it will not be used."""
        self._file.close()

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _put(self, data: bytes | memoryview, at: int) -> None:
        self._file.seek(at)
        rest = memoryview(data)
        # Linux writes two gigabytes at most at a time.
        while rest:
            rest = rest[self._file.write(rest) :]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A file of tensors that are there."""
    described = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with TensorWriter(path, described, metadata) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)
