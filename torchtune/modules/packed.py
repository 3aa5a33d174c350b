"""Weights that rest in fewer bits than they are computed in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchtune.errors import UnsupportedError

_KINDS: dict[str, type[PackedWeight]] = {}


class PackedWeight(Tensor):
    """A frozen weight with the shape and type of the dense one; `dense` unpacks it.

    An interface: the kinds are in torchtune/quantization. A layer never keeps what it unpacked, for the backward
    pass it is unpacked again. A stack of matrices [E, ., .] is unpacked matrix by matrix: `weight[e].dense(dtype)`.

    It moves between devices and is copied like any parameter, torch.compile traces it, and FSDP shares it among ranks
    and gathers it packed. Whatever else is asked of it is refused: to be unpacked unnoticed is what it is there to
    prevent.

    Args:
        parts: the tensors that it holds, each an attribute. Those of a stack are stacks themselves, of each
            matrix's part, but for the `shared` ones. So are those of a matrix that was put together from rows of
            several ranks, each of whom has packed its own.
        shape: the dense weight's, of 2 dims or 3.
        dtype: the dense weight's; a label, since `dense` is told which one to give.

    Attributes:
        block: so many values, one after the other along the rows, are quantised together.
    """

    shared: ClassVar[Sequence[str]] = ()
    block: ClassVar[int]

    part_names: tuple[str, ...]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _KINDS[cls.__name__] = cls

    @staticmethod
    def __new__(
        cls: type[PackedWeight], parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype
    ) -> PackedWeight:
        device = next(iter(parts.values())).device
        made: PackedWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        return made

    def __init__(self, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> None:
        self.part_names = tuple(parts)
        for name, part in parts.items():
            setattr(self, name, part)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The values of one matrix, in `dtype`.

        Raises:
            UnsupportedError: it is a stack.
        """
        raise NotImplementedError

    @property
    def held_bytes(self) -> int:
        """What it takes in memory; `nbytes` is what the dense weight would."""
        return sum(getattr(self, name).nbytes for name in self.part_names)

    @property
    def own_names(self) -> list[str]:
        """The parts that are this weight's alone."""
        return [name for name in self.part_names if name not in self.shared]

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], tuple[torch.Size, dict[str, Tensor]]]:
        """What FSDP gathers of the rows that this rank has: their packed parts, as they are.

        Returns:
            The parts; and for `fsdp_post_all_gather` the shape of all rows together, and what all ranks have.
        """
        shared = {name: getattr(self, name) for name in self.part_names if name in self.shared}
        return tuple(getattr(self, name) for name in self.own_names), (outer_size, shared)

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: Sequence[Tensor],
        metadata: tuple[torch.Size, dict[str, Tensor]],
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[PackedWeight, tuple[()]] | None:
        """The weight of all ranks' rows, that lies in what was gathered.

        Args:
            all_gather_outputs: each part of all ranks, one after the other.
            out: it was made before, and what was gathered now lies in the same memory: there is nothing to do.
        """
        if out is not None:
            return None
        shape, shared = metadata
        gathered = dict[str, Tensor]()
        for name, of_all in zip(self.own_names, all_gather_outputs, strict=True):
            own = getattr(self, name).shape
            # A stack of matrices is a longer stack; a matrix becomes a stack of each rank's rows.
            gathered[name] = of_all.view(-1, *(own[1:] if self.dim() == 3 else own))
        parts = {name: gathered[name] if name in gathered else shared[name] for name in self.part_names}
        return type(self)(parts, shape, param_dtype), ()

    def requires_grad_(self, requires_grad: bool = True) -> PackedWeight:
        """Refused, unless it stays frozen."""
        if requires_grad:
            raise UnsupportedError(
                f"{self!r} is packed and can't be trained: freeze it (requires_grad=False), or load it without quantisation"
            )
        super().requires_grad_(False)
        return self

    def with_parts(
        self,
        change: Callable[[Tensor], Tensor],
        *,
        names: Sequence[str] | None = None,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> PackedWeight:
        """Another of its kind, with `change` applied to all its parts or to those of `names`."""
        parts = {name: getattr(self, name) for name in self.part_names}
        changed = {name: change(part) if names is None or name in names else part for name, part in parts.items()}
        return type(self)(changed, self.shape if shape is None else shape, dtype or self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch names it otherwise
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype}, device='{self.device}')"

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return list(self.part_names), self.dtype

    @classmethod
    def __tensor_unflatten__(
        cls, parts: dict[str, Tensor], dtype: torch.dtype, outer_size: Sequence[int], outer_stride: Sequence[int]
    ) -> PackedWeight:
        return cls(parts, outer_size, dtype)

    # Without it torch would give results the class of their arguments.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's own way

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch calls it so, and declares it otherwise
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        weight = args[0] if args else None
        if func not in _OPERATORS or not isinstance(weight, PackedWeight):
            packed = next((each for each in args if isinstance(each, PackedWeight)), None)
            raise UnsupportedError(
                f"{cls.__name__ if packed is None else packed!r} is packed and has no {func}: "
                "unpack it first (torchtune.modules.packed.dense)"
            )
        return _OPERATORS[func](weight, *args[1:], **(kwargs or {}))


def dense(weight: Tensor, like: torch.dtype | Tensor) -> Tensor:
    """A weight in the type that is computed in: unpacked, cast, or as it is.

    Args:
        like: the type; in a backward pass the gradient that it is multiplied with, which has the type. Compiled,
            the weight is then made after that gradient. From the type alone torch.compile would see the forward
            pass's computation again, and keep its result: all weights, dense, from one pass to the other.
    """
    if isinstance(like, torch.dtype):
        return weight.dense(like) if isinstance(weight, PackedWeight) else weight.to(like)
    if not torch.compiler.is_compiling():
        return dense(weight, like.dtype)
    if isinstance(weight, PackedWeight):
        parts = [getattr(weight, name) for name in weight.part_names]
        names = ",".join(weight.part_names)
        made: Tensor = _dense_after(like, parts, type(weight).__name__, names, weight.shape)
        return made
    return weight if weight.dtype == like.dtype else _dense_after(like, [weight], "", "", weight.shape)


def unpacked(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """All of a weight, a matrix or a stack of them, in `dtype`."""
    if weight.dim() == 2:
        return weight.dense(dtype)
    return torch.stack([dense(weight[index], dtype) for index in range(len(weight))])


@torch.library.custom_op("torchtune::dense_after", mutates_args=())
def _dense_after(like: Tensor, parts: list[Tensor], kind: str, names: str, shape: list[int]) -> Tensor:
    """`dense` as one operator, in the type of `like`, and after it."""
    if not kind:
        return parts[0].to(like.dtype)
    named = dict(zip(names.split(","), parts, strict=True))
    return _KINDS[kind](named, shape, like.dtype).dense(like.dtype)


@_dense_after.register_fake
def _(like: Tensor, parts: list[Tensor], kind: str, names: str, shape: list[int]) -> Tensor:
    return parts[0].new_empty(shape, dtype=like.dtype)


def _detach(weight: PackedWeight) -> PackedWeight:
    return weight.with_parts(Tensor.detach)


def _clone(weight: PackedWeight, *, memory_format: torch.memory_format | None = None) -> PackedWeight:
    return weight.with_parts(Tensor.clone)


def _to_copy(
    weight: PackedWeight,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    non_blocking: bool = False,
    **layout: Any,
) -> PackedWeight:
    """On another device; another type changes what it says it is, not what it holds."""
    if dtype is not None and not dtype.is_floating_point:
        raise UnsupportedError(f"{weight!r} is packed and can't become {dtype}: unpack it first")
    return weight.with_parts(lambda part: part.to(device=device, non_blocking=non_blocking, copy=True), dtype=dtype)


def _select(weight: PackedWeight, dim: int, index: int) -> PackedWeight:
    """One matrix of a stack."""
    if dim != 0 or weight.dim() != 3:
        raise UnsupportedError(f"{weight!r} is packed and has no rows or columns to take out: unpack it first")
    return weight.with_parts(lambda part: part.select(0, index), names=weight.own_names, shape=weight.shape[1:])


def _view(weight: PackedWeight, shape: Sequence[int]) -> PackedWeight:
    """As it is, for DTensors; or flat, for FSDP, that keeps it so beside the other and never looks at it."""
    if list(shape) not in ([-1], list(weight.shape)):
        raise UnsupportedError(f"{weight!r} is packed and can't become {list(shape)}: unpack it first")
    return weight.with_parts(Tensor.detach, shape=weight.shape if list(shape) != [-1] else [weight.numel()])


def _as_strided(
    weight: PackedWeight, shape: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> PackedWeight:
    """As it is: what FSDP asks of all that it has gathered, to cut off what filled the last rank's share."""
    if (list(shape), list(stride), storage_offset or 0) != (list(weight.shape), list(weight.stride()), 0):
        raise UnsupportedError(f"{weight!r} is packed and has no view of {list(shape)}: unpack it first")
    return weight.with_parts(Tensor.detach)


def _is_pinned(weight: PackedWeight, device: torch.device | None = None) -> bool:
    """Whether the device can fetch it from the host without a copy, as FSDP wants of what it offloads."""
    return all(getattr(weight, name).is_pinned() for name in weight.part_names)


def _pin_memory(weight: PackedWeight, device: torch.device | None = None) -> PackedWeight:
    return weight.with_parts(Tensor.pin_memory)


def _slice(
    weight: PackedWeight, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> PackedWeight:
    """All of it: what FSDP takes of what it has pinned, to leave out what fills the last rank's share."""
    if (dim, start or 0, step) != (0, 0, 1) or (end is not None and end < len(weight)):
        raise UnsupportedError(f"{weight!r} is packed and has no rows or columns to take out: unpack it first")
    return weight.with_parts(Tensor.detach)


_OPERATORS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.detach.default: _detach,
    torch.ops.aten.clone.default: _clone,
    torch.ops.aten._to_copy.default: _to_copy,
    torch.ops.aten.select.int: _select,
    torch.ops.aten.view.default: _view,
    torch.ops.aten.as_strided.default: _as_strided,
    torch.ops.aten.is_pinned.default: _is_pinned,
    torch.ops.aten._pin_memory.default: _pin_memory,
    torch.ops.aten.slice.Tensor: _slice,
}
