"""int8: eight bits a weight, symmetric; by torchao."""

from __future__ import annotations

import torch
from torch import Tensor

from torchtune.quantization.affine import AffineWeight, dequantize, quantize
from torchtune.quantization.blocks import as_matrix, check_is_matrix

GROUP = 128


class Int8Weight(AffineWeight):
    """Groups of 128 weights, each with a scale; 1.016 bytes a weight.

    Attributes:
        codes: [., 128] int8, -127 to 127, by group.
        scale: [., 1] bfloat16.
    """

    block = GROUP

    codes: Tensor
    scale: Tensor

    @staticmethod
    def pack_matrix(matrix: Tensor) -> dict[str, Tensor]:
        """The parts of one matrix."""
        codes, scale, _ = quantize(matrix, group=GROUP, low=-127, high=127, symmetric=True, needed_for="int8")
        return {"codes": codes, "scale": scale}

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The values, rounded once to `dtype`."""
        check_is_matrix(self)
        return as_matrix(dequantize(self.codes, self.scale, dtype), self)
