"""Which results a checkpointed layer keeps: those that cost much for their size. The rest is computed again.

A number of a product's result costs as many multiplications as the product's rows are long, and one of attention's
as many as a document has tokens, times two: these are worth their memory, norms, rotations and gates are not. What is
worth it is still more than a model of gated blocks keeps by itself, whose fused operators keep little else; so results
that are much wider than what they are made of, the gate's, the up projection's and all that experts make, are
computed again as well. They are most of the memory and, of a dense layer, about half of the work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

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


class KeepWhatCosts:
    """The policy of one forward of a layer, for `torch.utils.checkpoint.create_selective_checkpoint_contexts`.

    A result that is kept may be written into afterwards, as the low-rank update is added to a product in place. It is
    kept as it is then, so what wrote into it must not run again: that counts as kept too.

    Raises:
        UnsupportedError: a kept result was read by an operator that is to run again, and written into later; it would
            read another value then. No block of ours does that.
    """

    def __init__(self) -> None:
        self._kept = set[int]()
        self._read = set[int]()

    def __call__(
        self, context: SelectiveCheckpointContext, operator: torch._ops.OpOverload, *args: Any, **kwargs: Any
    ) -> CheckpointPolicy:
        if _is_worth_its_memory(operator, args):
            self._kept |= _memory([context.op_output])
            return CheckpointPolicy.MUST_SAVE
        used = _memory([*args, *kwargs.values()]) & self._kept
        if written := _memory(_written(operator, args, kwargs)) & used:
            if written & self._read:
                raise UnsupportedError(
                    f"{operator} writes into a result that activation checkpointing keeps, after it was read; "
                    "use ac_option=2, every second layer, in place of op"
                )
            return CheckpointPolicy.MUST_SAVE
        if not operator.is_view:
            self._read |= used
        return CheckpointPolicy.PREFER_RECOMPUTE


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
