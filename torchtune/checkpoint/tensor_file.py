"""Tensors read from a file straight into memory of their own.

The usual way is to map the file; page by page that takes two to three times as long as reading it
(benchmarks/load_model.py), and the mapped pages have to be copied besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from torchtune.checkpoint.headers import TensorHeader
from torchtune.errors import CheckpointError


class TensorFile:
    """An open file in which tensors lie as they do in memory.

    Args:
        places: the tensors, and the byte at which each begins.
    """

    def __init__(self, path: Path, places: Mapping[str, tuple[TensorHeader, int]]) -> None:
        self.places = places
        self._path = path
        self._file = path.open("rb", buffering=0)

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU.

        Raises:
            CheckpointError: the file ends within it, so it was cut after its header was read.
        """
        header, _ = self.places[name]
        tensor = torch.empty(header.shape, dtype=header.dtype)
        self.read_into(tensor, name)
        return tensor

    def read_into(self, tensor: Tensor, name: str) -> None:
        """Fill a contiguous tensor of the same shape and type.

        Raises: as `read`.
        """
        if tensor.numel():
            self._fill(tensor.view(-1).view(torch.uint8).numpy().data, name, self.places[name][1])

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _fill(self, memory: memoryview, name: str, start: int) -> None:
        self._file.seek(start)
        position = 0
        # Linux reads two gigabytes at most at a time.
        while num_read := self._file.readinto(memory[position:]):
            position += num_read
        if position < len(memory):
            raise CheckpointError(f"ends within tensor '{name}'; it was changed after it was opened", path=self._path)
