"""Headers of safetensors files: what is in them and whether all of it is there, without reading a weight.

Format: https://huggingface.co/docs/safetensors (eight bytes of header length, a JSON header, the data).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

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
}


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
        """One tensor on the CPU."""

    def close(self) -> None:
        """Let go of the files."""


def read_safetensors_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: the file is cut, empty or no safetensors file; says its size and what it should be.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MAX_HEADER_BYTES or length > size - 8:
            raise CheckpointError(f"{size} bytes are no complete safetensors file; download it again", path=path)
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"its header is damaged ({error}); download it again", path=path) from error
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != end:
        raise CheckpointError(f"it has {size} bytes where its header says {end}; download it again", path=path)
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"tensor '{name}' has the type {entry['dtype']}, which is not supported", path=path)
        found[name] = TensorHeader(tuple(entry["shape"]), DTYPES[entry["dtype"]], path)
    return found


def read_json(path: Path) -> Any:
    """A JSON file, as UTF-8 whatever the locale.

    Raises:
        CheckpointError: it is not there or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError("is missing", path=path) from error
    except ValueError as error:
        raise CheckpointError(f"is no JSON: {error}", path=path) from error
