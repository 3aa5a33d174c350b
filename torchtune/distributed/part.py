"""Which part of a tensor a rank holds.

Whatever splits a tensor, a rank's part is a product: along each dim some stretches of the whole, one after the other.
Tensor parallelism takes stretches of one dim (two of a matrix in which gate and up lie one after the other), experts
are stretches of the first, and FSDP takes a stretch of what these left of the first. Reading, writing and moving
between world sizes need to know no more than that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor, nn

Range = tuple[int, int]
Slices = tuple[slice, ...]

_ATTRIBUTE = "_parts_of_parameters"


@dataclass(frozen=True)
class Part:
    """A part of a tensor.

    Attributes:
        whole: the shape of all of it.
        ranges: for each dim the stretches of the whole that are held, [start, end), rising.
    """

    whole: tuple[int, ...]
    ranges: tuple[tuple[Range, ...], ...]

    @classmethod
    def all_of(cls, shape: Sequence[int]) -> Part:
        """The whole tensor."""
        return cls(tuple(shape), tuple(((0, size),) for size in shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is held."""
        return tuple(sum(end - start for start, end in of_dim) for of_dim in self.ranges)

    @property
    def numel(self) -> int:
        """The number of elements that are held."""
        return math.prod(self.shape)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing."""
        return self == Part.all_of(self.whole)

    def narrow(self, dim: int, start: int, length: int) -> Part:
        """What lies at `start` to `start + length` of what is held along `dim`."""
        kept, position = [], 0
        for first, end in self.ranges[dim]:
            low, high = max(start - position, 0), min(start + length - position, end - first)
            if low < high:
                kept.append((first + low, first + high))
            position += end - first
        return self._with(dim, kept)

    def take(self, dim: int, index: int, num: int, *, stretches: Sequence[int] = ()) -> Part:
        """One of `num` equal shares along `dim`; the first ones are larger where it can't be divided.

        Args:
            stretches: lengths of what lies one after the other along `dim` and is shared each for itself, as gate and
                up are; by default all is one.
        """
        kept, position = list[Range](), 0
        for length in stretches or (self.shape[dim],):
            size = -(-length // num)
            start = min(index * size, length)
            kept += self.narrow(dim, position + start, min(size, length - start)).ranges[dim]
            position += length
        return self._with(dim, kept)

    def meet(self, other: Part) -> Part:
        """What is held of the same whole here and there."""
        met = self
        for dim, (mine, theirs) in enumerate(zip(self.ranges, other.ranges, strict=True)):
            met = met._with(dim, [stretch.in_whole for stretch in _common(mine, theirs)])
        return met

    def inside(self, outer: Part) -> Part:
        """This part, which `outer` holds too, as a part of what `outer` holds."""
        seen = Part.all_of(outer.shape)
        for dim, (mine, theirs) in enumerate(zip(self.ranges, outer.ranges, strict=True)):
            seen = seen._with(dim, [stretch.in_second for stretch in _common(mine, theirs)])
        return seen

    def overlaps(self, other: Part) -> Iterator[tuple[Slices, Slices]]:
        """Blocks that both hold: where each lies in what is held here, and where in what `other` holds."""
        per_dim = [_common(mine, theirs) for mine, theirs in zip(self.ranges, other.ranges, strict=True)]
        for chosen in product(*per_dim):
            yield tuple(slice(*each.in_first) for each in chosen), tuple(slice(*each.in_second) for each in chosen)

    def rectangles(self) -> Iterator[tuple[Slices, Slices]]:
        """Where each contiguous block lies in what is held, and where in the whole."""
        return self.overlaps(Part.all_of(self.whole))

    def of(self, tensor: Tensor) -> Tensor:
        """This part of the whole `tensor`; a view where it is one block, else a copy."""
        for dim, of_dim in enumerate(self.ranges):
            pieces = [tensor.narrow(dim, start, end - start) for start, end in of_dim]
            empty = tensor.narrow(dim, 0, 0)
            tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim) if pieces else empty
        return tensor

    def put(self, held: Tensor, into: Tensor) -> None:
        """Write what is held to its places in a tensor of the whole shape."""
        for local, in_whole in self.rectangles():
            into[in_whole].copy_(held[local])

    def _with(self, dim: int, kept: Sequence[Range]) -> Part:
        merged = list[Range]()
        for start, end in kept:
            if merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((start, end))
        return Part(self.whole, (*self.ranges[:dim], tuple(merged), *self.ranges[dim + 1 :]))


@dataclass(frozen=True)
class _Stretch:
    """A range that two lists of ranges have in common: in the whole, and where it lies in what each makes up."""

    in_whole: Range
    in_first: Range
    in_second: Range


def _common(first: Sequence[Range], second: Sequence[Range]) -> list[_Stretch]:
    found, before = [], 0
    for start, end in first:
        also_before = 0
        for other_start, other_end in second:
            low, high = max(start, other_start), min(end, other_end)
            if low < high:
                place, other_place = before + low - start, also_before + low - other_start
                found.append(
                    _Stretch((low, high), (place, place + high - low), (other_place, other_place + high - low))
                )
            also_before += other_end - other_start
        before += end - start
    return found


def set_part(module: nn.Module, name: str, part: Part) -> None:
    """Note that `module`'s own parameter `name` is a part of a larger one."""
    module.__dict__.setdefault(_ATTRIBUTE, {})[name] = part


def part_of(module: nn.Module, name: str) -> Part:
    """Which part `module`'s own parameter or buffer `name` is, on this rank."""
    tensor = getattr(module, name)
    part: Part = module.__dict__.get(_ATTRIBUTE, {}).get(name) or Part.all_of(tensor.shape)
    if is_sharded(tensor):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        for dim, (length, start) in enumerate(zip(shape, offset, strict=True)):
            part = part.narrow(dim, start, length)
    return part


@torch.no_grad()
def set_held(module: nn.Module, name: str, whole: Tensor) -> None:
    """Give `module`'s own parameter `name` its values, of which this rank keeps its part."""
    local(getattr(module, name)).copy_(part_of(module, name).of(whole))


def parts(model: nn.Module) -> dict[str, Part]:
    """Of each parameter and buffer by its name, which part this rank holds."""
    found: dict[str, Part] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        found.update({prefix + name: part_of(module, name) for name, _ in own})
    return found


def held_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What this rank holds of each parameter and buffer, by name, as plain tensors that share their memory."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: local(tensor.detach()) for name, tensor in named}


def is_sharded(tensor: Tensor) -> bool:
    """Whether FSDP has split it, so that this rank holds a part of what it says it is."""
    if not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor  # half a second, that a run on one device does not wait

    return isinstance(tensor, DTensor)


def holding(parameter: Tensor, held: Tensor) -> nn.Parameter:
    """A parameter in place of `parameter`, split as it is, of which this rank holds `held`."""
    if is_sharded(parameter):
        from torch.distributed.tensor import DTensor

        mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]  # a DTensor
        shape, stride = parameter.shape, parameter.stride()
        held = DTensor.from_local(held.detach(), mesh, placements, run_check=False, shape=shape, stride=stride)
    return nn.Parameter(held, parameter.requires_grad)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, as a plain one that shares its memory."""
    held: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]  # a DTensor
    return held
