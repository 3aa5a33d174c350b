"""Tensors read from a file straight into memory of their own.

The usual way is to map the file; page by page that takes two to three times as long as reading it
(benchmarks/load_model.py), and the mapped pages have to be copied besides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from torchtune.checkpoint.headers import TensorHeader
from torchtune.distributed.part import Part
from torchtune.errors import CheckpointError

# Of rows that are read in part: what is read at a time, and how long a stretch of a row is read by itself.
BLOCK_BYTES = 4 * 2**20
STRETCH_BYTES = 2**18


class TensorFile:
    """An open file in which tensors lie as they do in memory.

    Args:
        places: the tensors, and the byte at which each begins.
    """

    def __init__(self, path: Path, places: Mapping[str, tuple[TensorHeader, int]]) -> None:
        self.places = places
        self._path = path
        self._file = path.open("rb", buffering=0)
        self._block: Tensor | None = None

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU.

        Raises:
            CheckpointError: the file ends within it, so it was cut after its header was read.
        """
        return self.read_part(name, Part.all_of(self.places[name][0].shape))

    def read_part(self, name: str, part: Part) -> Tensor:
        """A part of one tensor on the CPU; what lies between its rows is gone through in blocks, and not kept.

        Raises: as `read`.
        """
        held = torch.empty(part.shape, dtype=self.places[name][0].dtype)
        self.read_into(held, name, part)
        return held

    def read_into(self, into: Tensor, name: str, part: Part) -> None:
        """Fill a tensor of the part's shape: straight from the file where it is as it lies there, else block by block.

        Raises: as `read`.
        """
        if into.numel():
            for mine, theirs in part.rectangles():
                self._read_block(into[mine], name, theirs)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read_block(self, into: Tensor, name: str, block: tuple[slice, ...]) -> None:
        """One block of a tensor, of which `into` has the shape."""
        header, begin = self.places[name]
        cut = [dim for dim, (chosen, size) in enumerate(zip(block, header.shape, strict=True)) if _len(chosen) < size]
        dim = max(cut, default=0)
        inner = math.prod(header.shape[dim + 1 :]) * header.dtype.itemsize
        if dim == 0:
            first = block[0].start if block else 0
            self._read_run(into, name, begin + first * inner)
            return
        # Along `dim` the block is a stretch of each row.
        row_bytes = header.shape[dim] * inner
        start, end = block[dim].start * inner, block[dim].stop * inner
        for outer in product(*(range(_len(chosen)) for chosen in block[: dim - 1])):
            row = 0
            for chosen, size, index in zip(block, header.shape, outer, strict=False):
                row = row * size + chosen.start + index
            row = row * header.shape[dim - 1] + block[dim - 1].start
            self._read_stretches(into[outer], name, begin + row * row_bytes, row_bytes, slice(start, end))

    def _read_stretches(self, into: Tensor, name: str, begin: int, row_bytes: int, stretch: slice) -> None:
        """The same bytes of rows that lie one after the other; `into` has a row for each."""
        if _len(stretch) >= STRETCH_BYTES:
            for index, row in enumerate(into):
                self._read_run(row, name, begin + index * row_bytes + stretch.start)
            return
        num_rows = max(BLOCK_BYTES // row_bytes, 1)
        buffer = torch.empty(min(num_rows, len(into)), row_bytes, dtype=torch.uint8)
        for index in range(0, len(into), num_rows):
            rows = into[index : index + num_rows]
            self._fill(_memory(buffer[: len(rows)]), name, begin + index * row_bytes)
            chosen = buffer[: len(rows), stretch].contiguous().view(self.places[name][0].dtype)
            rows.copy_(chosen.view(rows.shape))

    def _read_run(self, into: Tensor, name: str, begin: int) -> None:
        """What lies in one run of bytes, as a tensor of any type and strides."""
        dtype = self.places[name][0].dtype
        if into.dtype == dtype and into.device.type == "cpu" and into.is_contiguous():
            self._fill(_memory(into), name, begin)
            return
        num_bytes = into.numel() * dtype.itemsize
        if num_bytes <= BLOCK_BYTES:
            # One block for all: a new one for each would leave holes that the allocator does not fill.
            self._block = torch.empty(BLOCK_BYTES, dtype=torch.uint8) if self._block is None else self._block
            block = self._block[:num_bytes]
            self._fill(_memory(block), name, begin)
            into.copy_(block.view(dtype).view(into.shape))
            return
        row_bytes = num_bytes // len(into)
        step = BLOCK_BYTES // row_bytes
        for index in range(0, len(into), step or 1):
            self._read_run(into[index : index + step] if step else into[index], name, begin + index * row_bytes)

    def _fill(self, memory: memoryview, name: str, start: int) -> None:
        self._file.seek(start)
        position = 0
        # Linux reads two gigabytes at most at a time.
        while num_read := self._file.readinto(memory[position:]):
            position += num_read
        if position < len(memory):
            raise CheckpointError(f"ends within tensor '{name}'; it was changed after it was opened", path=self._path)


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _len(chosen: slice) -> int:
    return int(chosen.stop) - int(chosen.start)
