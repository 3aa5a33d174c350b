"""Weights in MXFP4, as gpt-oss is released: read as bfloat16.

A block of 32 values of four bits shares a scale, a power of two. The checkpoint holds, for a parameter X
[E, in, out], `X_blocks` [E, out, in / 32, 16], two values a byte, the lower half first, and `X_scales`
[E, out, in / 32], an exponent each. Every value is one of bfloat16's, so that nothing is rounded.
Format: OCP Microscaling Formats (MX) 1.0. Layout: transformers' integrations/mxfp4.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchtune.checkpoint.headers import TensorHeader, WeightSource
from torchtune.distributed.part import Part
from torchtune.errors import CheckpointError

BLOCKS, SCALES = "_blocks", "_scales"
# Sign, two bits of exponent, one of mantissa.
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_VALUES = (*MAGNITUDES, *(-value for value in MAGNITUDES))


class MXFP4Weights(WeightSource):
    """A source of tensors in which packed ones stand under their parameter's name, as bfloat16.

    Args:
        packed: the checkpoint's tensors as they lie in its files.
    Raises:
        CheckpointError: blocks without scales that fit them.
    """

    def __init__(self, packed: WeightSource) -> None:
        self._packed = packed
        self.headers: dict[str, TensorHeader] = dict(packed.headers)
        for name in packed.headers:
            if name.endswith(BLOCKS) and packed.headers[name].dtype == torch.uint8:
                parameter = name.removesuffix(BLOCKS)
                self.headers[parameter] = self._take_header(parameter)

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU; of a packed one no more than an expert is in work at a time."""
        if name in self._packed.headers:
            return self._packed.read(name)
        return dequantise(self._packed.read(name + BLOCKS), self._packed.read(name + SCALES))

    def read_part(self, name: str, part: Part) -> Tensor:
        """A part of one tensor; of a packed one its experts are read alone, and these whole."""
        if name in self._packed.headers:
            return self._packed.read_part(name, part)
        blocks, scales = (
            self._packed.read_part(other, _experts(part, self._packed.headers[other].shape))
            for other in (name + BLOCKS, name + SCALES)
        )
        return part.inside(_experts(part, part.whole)).of(dequantise(blocks, scales)).contiguous()

    def close(self) -> None:
        """Let go of the files."""
        self._packed.close()

    def _take_header(self, parameter: str) -> TensorHeader:
        blocks, scales = self.headers.pop(parameter + BLOCKS), self.headers.pop(parameter + SCALES, None)
        if len(blocks.shape) != 4 or scales is None or scales.shape != blocks.shape[:-1]:
            held = "there are none" if scales is None else f"they have the shape {scales.shape}"
            raise CheckpointError(
                f"tensor '{parameter}{BLOCKS}' {blocks.shape} needs '{parameter}{SCALES}' {blocks.shape[:-1]}; {held}",
                path=blocks.file,
            )
        num_experts, num_out, num_blocks, num_bytes = blocks.shape
        return TensorHeader((num_experts, num_blocks * num_bytes * 2, num_out), torch.bfloat16, blocks.file)


def _experts(part: Part, shape: tuple[int, ...]) -> Part:
    """Of a tensor of this shape, the experts that are in `part`, whole."""
    return Part(shape, (part.ranges[0], *Part.all_of(shape).ranges[1:]))


def dequantise(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks [E, out, G, B] and scales [E, out, G], both uint8, -> bfloat16 [E, G * B * 2, out]."""
    num_experts, num_out, num_blocks, num_bytes = blocks.shape
    values = torch.tensor(FP4_VALUES)
    byte = torch.arange(256)
    # What each byte stands for is two bfloat16 values, looked up as one number of 32 bits.
    pairs = torch.stack((values[byte & 15], values[byte >> 4]), dim=-1).bfloat16().view(torch.int32).flatten()
    powers = torch.tensor([math.ldexp(1.0, exponent - 127) for exponent in range(255)] + [math.nan]).bfloat16()
    out = torch.empty(num_experts, num_blocks * num_bytes * 2, num_out, dtype=torch.bfloat16)
    for index in range(num_experts):
        found = pairs[blocks[index].int()].view(torch.bfloat16)  # [out, G, 2 B]
        out[index] = found.mul_(powers[scales[index].int()].unsqueeze(-1)).flatten(1).T
    return out
