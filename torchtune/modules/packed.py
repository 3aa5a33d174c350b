"""Weights that rest in fewer bits than they are computed in."""

from __future__ import annotations

import torch
from torch import Tensor


class PackedWeight(Tensor):
    """A frozen weight with the shape and type of the dense one; `dense` unpacks it.

    An interface: the kinds are in torchtune/quantization. A layer never keeps what it unpacked, for the backward
    pass it is unpacked again.
    """

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The values, in `dtype`."""
        raise NotImplementedError


def dense(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in the type that is computed in: unpacked, cast, or as it is."""
    return weight.dense(dtype) if isinstance(weight, PackedWeight) else weight.to(dtype)
