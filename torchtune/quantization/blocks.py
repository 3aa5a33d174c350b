"""A matrix as a run of blocks, each with a scale of its own: how all kinds of packed weights lie.

Blocks follow one another along the rows and don't end with them, so any shape can be packed; zeros fill the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune.errors import CheckpointError, UnsupportedError
from torchtune.modules.packed import PackedWeight

# Elements that are quantised at a time: what that takes beside the weight is some 10 MB, whatever its size. More at a
# time is slower on the CPU, where it falls out of the cache (int8: 34 ms for 2048 x 4096, 50 at four times as many).
SLAB = 1 << 18


def pack_each(
    weight: Tensor, pack: Callable[[Tensor], dict[str, Tensor]], *, shared: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The parts of a matrix; of a stack of matrices those of each, stacked.

    Args:
        weight: [., .] or [E, ., .].
        pack: the parts of a matrix.
        shared: those that are the same for all, and not stacked.
    Raises:
        UnsupportedError: `weight` is of another form or no plain tensor of floats, or has no values.
    """
    shown = f"a weight of shape {list(weight.shape)} and type {weight.dtype}"
    if weight.dim() not in (2, 3) or not weight.dtype.is_floating_point or weight.dtype.itemsize == 1:
        raise UnsupportedError(
            f"{shown} can't be quantised: it must be a matrix of floats of 16 bits or more, or a stack of them"
        )
    if weight.numel() == 0 or weight.is_meta or isinstance(weight, PackedWeight):
        why = "it has no element" if weight.numel() == 0 else "it has no values" if weight.is_meta else "it is already"
        raise UnsupportedError(f"{shown} can't be quantised: {why}")
    weight = weight.detach()
    if weight.dim() == 2:
        return pack(weight)
    each = [pack(matrix) for matrix in weight]
    return {
        name: part if name in shared else torch.stack([parts[name] for parts in each]) for name, part in each[0].items()
    }


def slabs(matrix: Tensor, size: int) -> Iterator[Tensor]:
    """`matrix` in float32 as blocks [., size], so many at a time; zeros fill the last block.

    Raises:
        CheckpointError: a value is not finite, and would spoil its whole block.
    """
    for slab in matrix.reshape(-1).split(SLAB // size * size):
        if not slab.isfinite().all():
            raise CheckpointError("a weight that is to be quantised holds values that are not finite")
        yield F.pad(slab.float(), (0, -slab.numel() % size)).view(-1, size)


def as_matrix(blocks: Tensor, weight: PackedWeight) -> Tensor:
    """Blocks [., size] as the matrix that `weight` is, without what filled the last.

    Args:
        blocks: or [S, ., size], where S ranks have packed as many rows each.
    """
    num_shares = 1 if blocks.dim() == 2 else len(blocks)
    return blocks.reshape(num_shares, -1)[:, : weight.numel() // num_shares].reshape(weight.shape)


def check_is_matrix(weight: PackedWeight) -> None:
    """Refuse a stack: whole, it is what was not to be in memory.

    Raises:
        UnsupportedError: `weight` has 3 dims.
    """
    if weight.dim() != 2:
        raise UnsupportedError(f"{weight!r} is unpacked one matrix at a time: weight[e].dense(dtype)")
