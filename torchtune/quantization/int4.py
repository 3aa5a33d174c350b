"""int4: four bits a weight, in groups with a zero point; quantised by torchao.

The packing is ours: torchao's packed tensors are laid out for kernels of one device or another.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune.quantization.affine import AffineWeight, dequantize, quantize
from torchtune.quantization.blocks import as_matrix, check_is_matrix

GROUP = 64


class Int4Weight(AffineWeight):
    """Groups of 64 weights, each with a scale and a zero point; 0.547 bytes a weight.

    A zero point costs a byte a group and makes errors a tenth smaller on normal weights, a fifth on heavy-tailed.

    Letters: G groups, an even number.

    Attributes:
        codes: [G / 2, 64] uint8: the first half of all groups in the low bits, the second in the high ones, so that
            each is unpacked into its place in one run.
        scale: [G, 1] bfloat16.
        zero_point: [G, 1] int8, 0 to 15.
    """

    block = GROUP

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    @staticmethod
    def pack_matrix(matrix: Tensor) -> dict[str, Tensor]:
        """The parts of one matrix."""
        parts = quantize(matrix, group=GROUP, low=0, high=15, symmetric=False, needed_for="int4")
        codes, scale, zero_point = (F.pad(part, (0, 0, 0, len(part) % 2)) for part in parts)
        half = len(codes) // 2
        return {"codes": (codes[:half] | codes[half:] << 4).view(torch.uint8), "scale": scale, "zero_point": zero_point}

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The values, rounded once to `dtype`."""
        check_is_matrix(self)
        codes = torch.cat((self.codes & 15, self.codes >> 4), dim=-2).view(torch.int8)
        return as_matrix(dequantize(codes.sub_(self.zero_point), self.scale, dtype), self)
