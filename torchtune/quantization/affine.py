"""Integers in groups, each group with a scale and a zero point; quantised by torchao."""

from __future__ import annotations

import torch
from torch import Tensor

from torchtune.errors import CheckpointError
from torchtune.modules.packed import PackedWeight
from torchtune.quantization import libraries
from torchtune.quantization.blocks import pack_each, slabs


class AffineWeight(PackedWeight):
    """A packed weight of such integers; a kind says how a matrix is packed and unpacked."""

    @staticmethod
    def pack_matrix(matrix: Tensor) -> dict[str, Tensor]:
        """The parts of one matrix, by name."""
        raise NotImplementedError

    @classmethod
    def pack(cls, weight: Tensor) -> AffineWeight:
        """A matrix, or a stack of them.

        Raises:
            MissingDependencyError: torchao is not installed.
            CheckpointError, UnsupportedError: as `quantize` and `pack_each`.
        """
        return cls(pack_each(weight, cls.pack_matrix), weight.shape, weight.dtype)


def quantize(
    matrix: Tensor, *, group: int, low: int, high: int, symmetric: bool, needed_for: str
) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix as codes between `low` and `high`, whose values are (code - zero point) * scale.

    Scales are bfloat16: float32 holds such a product exactly, so that `dequantize` rounds once.

    Args:
        group: weights to a scale, along the rows and over their ends.
        symmetric: zero points are all 0.
    Returns:
        Codes [., group] int8, scales [., 1] bfloat16, zero points [., 1] int8; zeros fill the last group.
    Raises:
        MissingDependencyError: torchao is not installed.
        CheckpointError: as `slabs`, or a value is out of bfloat16's range.
    """
    library = libraries.torchao(needed_for)
    mapping = library.MappingType.SYMMETRIC if symmetric else library.MappingType.ASYMMETRIC
    block, parts = (1, group), []
    for slab in slabs(matrix, group):
        scale, zero_point = library.choose_qparams_affine(
            slab, mapping, block, torch.int8, low, high, scale_dtype=torch.bfloat16, zero_point_dtype=torch.int8
        )
        if not scale.isfinite().all():
            raise CheckpointError("a weight that is to be quantised holds values out of bfloat16's range")
        # It multiplies by the scale's reciprocal, which bfloat16 would round once more.
        codes = library.quantize_affine(slab, block, scale.float(), zero_point, torch.int8, low, high)
        parts.append((codes, scale.unsqueeze(1), zero_point.unsqueeze(1)))
    codes, scales, zero_points = map(torch.cat, zip(*parts, strict=True))
    return codes, scales, zero_points


def dequantize(differences: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes less their zero points, [., group] int8, times scale [., 1] bfloat16, in `dtype`."""
    # float16 hasn't the range of the scales.
    wide = torch.float32 if dtype == torch.float16 else dtype
    return differences.to(wide).mul_(scale.to(wide)).to(dtype)
