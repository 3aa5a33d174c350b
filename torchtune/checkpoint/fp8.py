"""Weights in FP8 with a scale a block, as DeepSeek V3 and R1 are released: read as bfloat16.

Beside a matrix X in float8 lies `X_scale_inv` in float32, one number for each block of 128 x 128 (or as
`weight_block_size` says); blocks at the edges may be cut. Source: DeepSeek-V3, 2024 (arXiv:2412.19437),
section 3.3; the layout is that of its release.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchtune.checkpoint.headers import TensorHeader, WeightSource
from torchtune.distributed.part import Part
from torchtune.errors import CheckpointError

SCALE = "_scale_inv"
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
BLOCK_SIZE = (128, 128)


class FP8Weights(WeightSource):
    """A source of tensors in which matrices in float8 are bfloat16.

    Args:
        scaled: the checkpoint's tensors as they lie in its files.
        options: the config's `quantization_config`.
    Raises:
        CheckpointError: a matrix without a scale for each of its blocks.
    """

    def __init__(self, scaled: WeightSource, options: Mapping[str, Any]) -> None:
        self._scaled = scaled
        rows, columns = options.get("weight_block_size") or BLOCK_SIZE
        self._block_size = (int(rows), int(columns))
        self.headers: dict[str, TensorHeader] = dict(scaled.headers)
        for name, header in scaled.headers.items():
            if header.dtype in FLOAT8:
                self._check_scale(name, header)
                del self.headers[name + SCALE]
                self.headers[name] = dataclasses.replace(header, dtype=torch.bfloat16)

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU."""
        tensor = self._scaled.read(name)
        if tensor.dtype not in FLOAT8:
            return tensor
        return dequantise(tensor, self._scaled.read(name + SCALE), self._block_size)

    def read_part(self, name: str, part: Part) -> Tensor:
        """A part of one tensor."""
        is_scaled = self._scaled.headers[name].dtype in FLOAT8
        return super().read_part(name, part) if is_scaled else self._scaled.read_part(name, part)

    def close(self) -> None:
        """Let go of the files."""
        self._scaled.close()

    def _check_scale(self, name: str, header: TensorHeader) -> None:
        scale = self._scaled.headers.get(name + SCALE)
        blocks = tuple(-(-size // block) for size, block in zip(header.shape, self._block_size, strict=False))
        if len(header.shape) != 2 or scale is None or scale.shape != blocks:
            held = "there are none" if scale is None else f"they have the shape {scale.shape}"
            raise CheckpointError(
                f"tensor '{name}' {header.shape} in float8 needs scales '{name}{SCALE}' {blocks}; {held}",
                path=header.file,
            )


def dequantise(weight: Tensor, scale: Tensor, block_size: tuple[int, int]) -> Tensor:
    """weight [out, in] in float8 and scale, a number for each block, -> bfloat16 [out, in]."""
    rows, columns = block_size
    out = torch.empty(weight.shape, dtype=torch.bfloat16)
    for index in range(len(scale)):  # a row of blocks at a time: no more than that is ever float32
        part = slice(index * rows, (index + 1) * rows)
        of_column = scale[index].float().repeat_interleave(columns)[: weight.shape[1]]
        out[part] = weight[part].float() * of_column
    return out
