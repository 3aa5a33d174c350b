"""Which results a checkpointed layer keeps: those that cost much for their size. The rest is computed again.

A number of a product's result costs as many multiplications as the product's rows are long, and one of attention's
as many as a document has tokens, times two: these are worth their memory, norms, rotations and gates are not. What is
worth it is still more than a model of gated blocks keeps by itself, whose fused operators keep little else; so results
that are much wider than what they are made of, the gate's, the up projection's and all that experts make, are
computed again as well. They are most of the memory and, of a dense layer, about half of the work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from torchtune.errors import UnsupportedError

# A result of at most so many times the width of what it is made of is kept: queries, keys and values together are,
# and gate and up, three or four times as wide and more, are not.
WIDEST_KEPT = 2
_aten = torch.ops.aten
# Where the operands stand among the arguments.
PRODUCTS = {_aten.mm.default: 0, _aten.addmm.default: 1}
ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}
# By name: they are there once what defines them is imported, on CUDA.
ATTENTION_NAMES = {"torch_attn::_varlen_attn"}
# What was summed over ranks costs a wait for them, not only a computation.
SUMS_NAMES = {"_c10d_functional::reduce_scatter_tensor", "_c10d_functional::all_reduce"}
# By the operator that made them, in its order.
Results = dict[torch._ops.OpOverload, list[Any]]


def keep_what_costs() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """What to run a layer's forward under, and what to compute it again under: `checkpoint`'s `context_fn`.

    Not torch's own `create_selective_checkpoint_contexts`: it has no place for a result that is written into after it
    was kept, as a low-rank update is added to a product in place. Here it is kept as it is then, and what wrote into it
    does not run again.
    """
    results: Results = {}
    return _Keep(results), _Give(results)


class _Keep(TorchDispatchMode):
    """Notes results that are worth it.

    Raises:
        UnsupportedError: a kept result was read by an operator that is to run again, and written into later; it would
            read another value then. No block of ours does that.
    """

    def __init__(self, results: Results) -> None:
        super().__init__()
        self._results = results
        self._kept, self._read = set[int](), set[int]()

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if _is_worth_its_memory(func, args):
            # Apart from the graph, which holds this: else both would live until Python looks for cycles.
            self._results.setdefault(func, []).append(tree_map_only(Tensor, Tensor.detach, result))
            self._kept |= _memory([result])
            return result
        written = _memory(_written(func, args, kwargs)) & self._kept
        if written & self._read:
            raise UnsupportedError(
                f"{func} writes into a result that activation checkpointing keeps, after it was read; "
                "use ac_option=2, every second layer, in place of op"
            )
        if not written and not func.is_view:
            self._read |= _memory([*args, *kwargs.values()]) & self._kept
        return result


class _Give(TorchDispatchMode):
    """Gives the results back, in their order, in place of running what made them."""

    def __init__(self, results: Results) -> None:
        super().__init__()
        self._results = results
        self._given: list[Any] = []

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_worth_its_memory(func, args):
            # Held until the layer is done, so that what lies in its memory is it and no later tensor.
            self._given.append(self._results[func].pop(0))
            return self._given[-1]
        written = _written(func, args, kwargs)
        if written and _memory(written) & _memory(self._given):
            return written[0]
        return func(*args, **kwargs)

    def __exit__(self, *exception: Any) -> None:
        self._given = []
        super().__exit__(*exception)


def _is_worth_its_memory(operator: torch._ops.OpOverload, args: Sequence[Any]) -> bool:
    if operator in ATTENTION or operator._schema.name in ATTENTION_NAMES | SUMS_NAMES:
        return True
    if operator not in PRODUCTS:
        return False
    x, matrix = args[PRODUCTS[operator] :][:2]
    return bool(matrix.shape[1] <= WIDEST_KEPT * x.shape[1])


def _written(operator: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that the operator changes."""
    if not operator._schema.is_mutable:
        return []
    arguments = operator._schema.arguments
    given = dict(zip((argument.name for argument in arguments), args, strict=False)) | dict(kwargs)
    return [given[argument.name] for argument in arguments if argument.is_write and argument.name in given]


def _memory(values: Iterable[Any]) -> set[int]:
    """Where the tensors among these lie, those in lists too; empty ones lie nowhere."""
    found = set[int]()
    for value in values:
        if isinstance(value, list | tuple):
            found |= _memory(value)
        elif type(value) in (Tensor, nn.Parameter) and value.numel():
            found.add(value.untyped_storage().data_ptr())
    return found
