"""int8: eight bits a weight, symmetric; by torchao."""

from __future__ import annotations

import torch
from torch import Tensor

from torchtune.modules.packed import PackedWeight
from torchtune.quantization.affine import dequantize, quantize
from torchtune.quantization.blocks import as_matrix, check_is_matrix, pack_each

GROUP = 128


class Int8Weight(PackedWeight):
    """Groups of 128 weights, each with a scale; 1.016 bytes a weight.

    Attributes:
        codes: [., 128] int8, -127 to 127, by group.
        scale: [., 1] bfloat16.
    """

    codes: Tensor
    scale: Tensor

    @classmethod
    def pack(cls, weight: Tensor) -> Int8Weight:
        """A matrix, or a stack of them.

        Raises:
            MissingDependencyError: torchao is not installed.
            CheckpointError, UnsupportedError: as `quantize` and `pack_each`.
        """
        return cls(pack_each(weight, _pack), weight.shape, weight.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The values, rounded once to `dtype`."""
        check_is_matrix(self)
        return as_matrix(dequantize(self.codes, self.scale, dtype), self)


def _pack(matrix: Tensor) -> dict[str, Tensor]:
    codes, scale, _ = quantize(matrix, group=GROUP, low=-127, high=127, symmetric=True, needed_for="int8")
    return {"codes": codes, "scale": scale}
