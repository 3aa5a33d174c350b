"""NF4: four bits a weight, whose 16 values are quantiles of a normal distribution; by bitsandbytes.

Source: Dettmers et al., 2023 (arXiv:2305.14314), section 3.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune.modules.packed import PackedWeight
from torchtune.quantization import libraries
from torchtune.quantization.blocks import as_matrix, check_is_matrix, pack_each, slabs

BLOCK = 64
ABSMAX_BLOCK = 256


class NF4Weight(PackedWeight):
    """Blocks of 64 weights, each with the largest magnitude in it; 0.5625 bytes a weight.

    By double quantisation the magnitudes rest in 8 bits: what they are above their mean, in blocks of 256 that
    have a scale each. That makes 0.5159 bytes a weight.

    Attributes:
        codes: [., 32] uint8, by block, two weights a byte.
        absmax: [.], by block: float32, or uint8 codes.
        absmax_scale: [.] float32, for each 256 of absmax.
        absmax_mean: float32, a scalar.
        absmax_code: [256] float32, what the codes of absmax stand for.
    """

    shared = ("absmax_code",)
    block = BLOCK

    codes: Tensor
    absmax: Tensor
    absmax_scale: Tensor
    absmax_mean: Tensor
    absmax_code: Tensor

    @classmethod
    def pack(cls, weight: Tensor, *, double_quantization: bool = True) -> NF4Weight:
        """A matrix, or a stack of them, as bitsandbytes quantises it.

        Raises:
            MissingDependencyError: bitsandbytes is not installed.
            CheckpointError, UnsupportedError: as `slabs` and `pack_each`.
        """
        libraries.bitsandbytes("NF4")
        pack = partial(_pack, double_quantization=double_quantization)
        return cls(pack_each(weight, pack, shared=cls.shared), weight.shape, weight.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The values, rounded once to `dtype`."""
        check_is_matrix(self)
        # float32 is the widest that the library gives, and what it computes in.
        given = torch.float32 if dtype == torch.float64 else dtype
        # A matrix of blocks: for rows of an odd length it has no kernel.
        codes, absmax = self.codes.flatten(0, -2), self._magnitudes().flatten()
        shape = (len(codes), BLOCK)
        blocks = torch.ops.bitsandbytes.dequantize_4bit(codes, absmax, BLOCK, "nf4", shape, given)
        return as_matrix(blocks.view(*self.codes.shape[:-1], BLOCK), self).to(dtype)

    def _magnitudes(self) -> Tensor:
        """absmax in float32, dequantised where it was quantised."""
        if self.absmax.dtype != torch.uint8:
            return self.absmax
        num = self.absmax.shape[-1]
        # Shares of several ranks are filled up to whole blocks, so that they can lie one after the other.
        codes = F.pad(self.absmax, (0, -num % ABSMAX_BLOCK))
        above_mean = torch.ops.bitsandbytes.dequantize_blockwise(
            codes, self.absmax_scale, self.absmax_code, ABSMAX_BLOCK, torch.float32
        )
        return (above_mean + self.absmax_mean[..., None])[..., :num]


def _pack(matrix: Tensor, *, double_quantization: bool) -> dict[str, Tensor]:
    packed = [torch.ops.bitsandbytes.quantize_4bit(slab, BLOCK, "nf4", torch.uint8) for slab in slabs(matrix, BLOCK)]
    codes = torch.cat([codes.view(-1, BLOCK // 2) for codes, _ in packed])
    absmax = torch.cat([absmax for _, absmax in packed])
    if not double_quantization:
        return {"codes": codes, "absmax": absmax}
    mean = absmax.mean()
    above_mean, state = libraries.bitsandbytes("NF4").quantize_blockwise(absmax - mean, blocksize=ABSMAX_BLOCK)
    return {
        "codes": codes,
        "absmax": above_mean,
        "absmax_scale": state.absmax,
        "absmax_mean": mean,
        "absmax_code": state.code,
    }
