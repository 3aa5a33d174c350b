"""Meta's `consolidated.*.pth` put together: each has a tensor-parallel rank's share of every matrix.

Names and rows are translated in layouts.py, `params.json` in meta_params.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchtune.checkpoint.headers import TensorHeader, WeightSource
from torchtune.distributed.part import Part
from torchtune.errors import CheckpointError

# The dimension along which ranks share a matrix; what is not here each rank has whole.
SHARED_DIM = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0}
EMBEDDING, NORM = "tok_embeddings.weight", "norm.weight"


class ConsolidatedShards(WeightSource):
    """Tensors of which every file has a share.

    Args:
        shards: the files in order.
    Raises:
        CheckpointError: a file lacks a tensor that another has, or has it in another shape.
    """

    def __init__(self, shards: Sequence[WeightSource]) -> None:
        self._shards = shards
        # Llama 3 shares the embedding by rows, its predecessors by columns.
        norm, embedding = (shards[0].headers.get(name) for name in (NORM, EMBEDDING))
        by_rows = norm is not None and embedding is not None and embedding.shape[1:] == norm.shape
        self._dims = {**SHARED_DIM, "tok_embeddings": 0 if by_rows else 1}
        self._check()
        self.headers = {name: self._header(name) for name in shards[0].headers}

    def read(self, name: str) -> Tensor:
        """One tensor, whole, on the CPU."""
        dim = self._dim(name)
        if dim is None:
            return self._shards[0].read(name)
        header = self.headers[name]
        whole, start = torch.empty(header.shape, dtype=header.dtype), 0
        for shard in self._shards:
            shape = shard.headers[name].shape
            size = shape[dim]
            shard.read_into(whole.narrow(dim, start, size), name, Part.all_of(shape))
            start += size
        return whole

    def close(self) -> None:
        """Let go of the files."""
        for shard in self._shards:
            shard.close()

    def _dim(self, name: str) -> int | None:
        return self._dims.get(name.split(".")[-2] if "." in name else name)

    def _header(self, name: str) -> TensorHeader:
        first, dim = self._shards[0].headers[name], self._dim(name)
        shape = list(first.shape)
        if dim is not None:
            shape[dim] = sum(shard.headers[name].shape[dim] for shard in self._shards)
        return TensorHeader(tuple(shape), first.dtype, first.file)

    def _check(self) -> None:
        first = self._shards[0].headers
        for shard in self._shards[1:]:
            file = next(iter(shard.headers.values())).file
            for name in sorted(set(first) ^ set(shard.headers)):
                lacking = file if name in first else next(iter(first.values())).file
                raise CheckpointError(f"has no share of the tensor '{name}', which the other files have", path=lacking)
            for name, header in shard.headers.items():
                if not self._fit(header, first[name], self._dim(name)):
                    raise CheckpointError(
                        f"its share of the tensor '{name}' is {header.shape} of {header.dtype}, in "
                        f"{first[name].file.name} it is {first[name].shape} of {first[name].dtype}",
                        path=file,
                    )

    @staticmethod
    def _fit(one: TensorHeader, two: TensorHeader, dim: int | None) -> bool:
        """Whether two shares are alike but for their sizes along the shared dimension."""
        shapes = [
            [size for axis, size in enumerate(header.shape) if axis != dim] + [len(header.shape)]
            for header in (one, two)
        ]
        has_dim = dim is None or dim < len(one.shape)
        return has_dim and one.dtype == two.dtype and shapes[0] == shapes[1]
