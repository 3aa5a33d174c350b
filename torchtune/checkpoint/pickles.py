"""Files of `torch.save` (.bin, .pt, .pth) as weights, with nothing in them run.

They are pickles, which can hold code; `weights_only` builds tensors and plain data alone and refuses the rest.
Those of today are zip archives, read a tensor at a time; those from before 2020 can only be read whole.
"""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from torch import Tensor

from torchtune.checkpoint.headers import TensorHeader, refuse_lfs_pointer
from torchtune.checkpoint.tensor_file import TensorFile
from torchtune.distributed.part import Part
from torchtune.errors import CheckpointError

SUFFIXES = (".bin", ".pt", ".pth")
ZIP = b"PK\x03\x04"
# A file may hold more than the weights, and then has them under one of these.
WRAPPERS = ("model", "state_dict")


class PickleFile:
    """An open file of `torch.save`, whose tensors are read by name.

    Raises:
        CheckpointError: as `read_pickle_header`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_mapped = _is_zip(path)
        self._plain = TensorFile(path, _places(path))
        self._tensors: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, in memory of its own."""
        if name in self._plain.places:
            return self._plain.read(name)
        tensor = self.peek(name)
        owns_memory = not self._is_mapped and tensor.is_contiguous() and self._fills_storage(tensor)
        return tensor if owns_memory else tensor.clone(memory_format=torch.contiguous_format)

    def read_part(self, name: str, part: Part) -> Tensor:
        """A part of one tensor on the CPU, in memory of its own."""
        if name in self._plain.places:
            return self._plain.read_part(name, part)
        return part.of(self.peek(name)).clone(memory_format=torch.contiguous_format)

    def read_into(self, into: Tensor, name: str, part: Part) -> None:
        """Fill a tensor of the part's shape."""
        if name in self._plain.places:
            self._plain.read_into(into, name, part)
        else:
            into.copy_(part.of(self.peek(name)))

    def peek(self, name: str) -> Tensor:
        """One tensor to look at while the file is open; it may be mapped."""
        if name not in self._tensors:
            self._tensors = _tensors(_load(self._path, map_location="cpu"), self._path)
        # What can't be mapped is given away: a second copy of the weights is never held while they are gone through.
        return self._tensors[name] if self._is_mapped else self._tensors.pop(name)

    def close(self) -> None:
        """Let go of the file and its tensors."""
        self._plain.close()
        self._tensors.clear()

    def _fills_storage(self, tensor: Tensor) -> bool:
        """Whether nothing else lies in the tensor's memory: not the rest of a larger one, nor another of the file's."""
        storage = tensor.untyped_storage()
        return storage.nbytes() == tensor.nbytes and all(
            other.untyped_storage().data_ptr() != storage.data_ptr() for other in self._tensors.values()
        )


def read_pickle_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors of a file of `torch.save`.

    Raises:
        CheckpointError: the file is cut or empty, has code in it, or holds something else than tensors by name.
    """
    found = _tensors(_load(path, map_location="meta"), path)
    return {name: TensorHeader(tuple(tensor.shape), tensor.dtype, path) for name, tensor in found.items()}


def _load(path: Path, *, map_location: str) -> Any:
    refuse_lfs_pointer(path)
    is_zip = _is_zip(path)
    try:
        # torch turns the bytes of such a file, and crashes where it has left them unread.
        is_native = not is_zip or _is_native(path)
        content = torch.load(path, weights_only=True, mmap=is_zip, map_location=map_location) if is_native else None
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        held = f"holds '{code[1]}', which can run code" if code else "holds something else than tensors and plain data"
        raise CheckpointError(
            f"{held} when it is read, so it was not read. Ask for a safetensors file. Where you trust it, and in a "
            f"place that has nothing to lose: python -c \"import torch; f = '{path}'; "
            "w = torch.load(f, map_location='cpu', weights_only=False); "
            'torch.save({k: v for k, v in w.items() if torch.is_tensor(v)}, f)"',
            path=path,
        ) from error
    except Exception as error:  # a damaged file makes torch.load raise nearly anything
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path.stat().st_size} bytes are no complete file of torch.save ({first_line}); download it again",
            path=path,
        ) from error
    if not is_native:
        raise CheckpointError(
            f"is of another byte order than {sys.byteorder} endian; save it on such a machine", path=path
        )
    return content


def _places(path: Path) -> dict[str, tuple[TensorHeader, int]]:
    """The tensors that lie in a zip file as they do in memory, and where."""
    if not _is_zip(path):
        return {}
    found = {}
    for name, tensor in _tensors(_load(path, map_location="meta"), path).items():
        # torch.load notes where a storage lies when it leaves it unread.
        start = tensor.untyped_storage()._checkpoint_offset
        if start is not None and tensor.is_contiguous():
            header = TensorHeader(tuple(tensor.shape), tensor.dtype, path)
            found[name] = (header, start + int(tensor.storage_offset()) * tensor.itemsize)
    return found


def _is_native(path: Path) -> bool:
    with ZipFile(path) as archive:
        orders = {archive.read(name) for name in archive.namelist() if name.endswith("/byteorder")}
    return orders <= {sys.byteorder.encode()}


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(ZIP)) == ZIP


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"holds no tensors by name but a {type(content).__name__}", path=path)
    for name, value in content.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            held = value.layout if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(f"'{name}' is no plain tensor but {held}, so this is no file of weights", path=path)
    return {str(name): tensor.detach() for name, tensor in content.items()}
