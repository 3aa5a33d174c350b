"""Weights that were quantised for inference, read as dense ones: what recipe `quantize` writes, and others in its form.

In a file lie several tensors for a matrix: torchtune/quantization/schemes.py says which. Here they stand under the
matrix's name, in the type that the config names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchtune.checkpoint.headers import TensorHeader, WeightSource
from torchtune.distributed.part import Part
from torchtune.errors import CheckpointError
from torchtune.modules.stored import stored_pieces
from torchtune.quantization.schemes import NF4_STATE, Scheme, nf4_state


class QuantizedWeights(WeightSource):
    """A source of tensors in which quantised matrices are dense.

    Args:
        stored: the checkpoint's tensors as they lie in its files.
        scheme: how they were quantised.
        dtype: the type that they are dense in.
    Raises:
        CheckpointError: parts of a matrix are missing, or don't fit together.
    """

    def __init__(self, stored: WeightSource, scheme: Scheme, dtype: torch.dtype) -> None:
        self._stored, self.scheme, self._dtype = stored, scheme, dtype
        self._parts: dict[str, dict[str, str]] = {}
        self.headers: dict[str, TensorHeader] = dict(stored.headers)
        mark = NF4_STATE if scheme.kind == "nf4" else "weight_scale"
        for name in stored.headers:
            if name.endswith(f".{mark}"):
                self._take(name.removesuffix(mark), stored.headers)

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU."""
        if name not in self._parts:
            return self._stored.read(name)
        parts = {part: self._stored.read(stored) for part, stored in self._parts[name].items()}
        return self.scheme.decode(parts, self._dtype)

    def read_part(self, name: str, part: Part) -> Tensor:
        """A part of one tensor."""
        return super().read_part(name, part) if name in self._parts else self._stored.read_part(name, part)

    def layers_of(self, model: nn.Module) -> list[str]:
        """The layers of a model, by their names in it, whose weights these are."""
        pieces = stored_pieces(model)
        return [name.removesuffix(".weight") for name in pieces if any(p.name in self._parts for p in pieces[name])]

    def close(self) -> None:
        """Let go of the files."""
        self._stored.close()

    def _take(self, layer: str, stored: Mapping[str, TensorHeader]) -> None:
        """Put one matrix in place of its parts."""
        shape, file = self._shape(layer, stored), stored[self._first(layer, stored)].file
        described = self.scheme.described(shape)
        for part, (wanted, _) in described.items():
            found = stored.get(layer + part)
            # What bitsandbytes says of a weight is as long as its numbers.
            if found is None or (found.shape != wanted and part != NF4_STATE):
                held = "it is not there" if found is None else f"it has the shape {found.shape}"
                raise CheckpointError(
                    f"'{layer}weight' {shape}, quantised as {self.scheme.kind}, needs a tensor '{layer}{part}' {wanted}; {held}",
                    path=file,
                )
            del self.headers[layer + part]
        self._parts[f"{layer}weight"] = {part: layer + part for part in described}
        self.headers[f"{layer}weight"] = TensorHeader(shape, self._dtype, file)

    def _first(self, layer: str, stored: Mapping[str, TensorHeader]) -> str:
        name = layer + ("weight_packed" if self.scheme.is_packed else "weight")
        if name not in stored:
            raise CheckpointError(f"a tensor '{name}' is missing beside its scales")
        return name

    def _shape(self, layer: str, stored: Mapping[str, TensorHeader]) -> tuple[int, ...]:
        first = stored[self._first(layer, stored)]
        if self.scheme.kind == "nf4":
            return tuple(nf4_state(self._stored.read(layer + NF4_STATE))["shape"])
        if not self.scheme.is_packed:
            return first.shape
        if f"{layer}weight_shape" not in stored:
            raise CheckpointError(f"a tensor '{layer}weight_shape' is missing", path=first.file)
        return tuple(self._stored.read(f"{layer}weight_shape").tolist())


def dense_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The type that a config names, or bfloat16."""
    named = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    found = getattr(torch, str(named).removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) else torch.bfloat16
