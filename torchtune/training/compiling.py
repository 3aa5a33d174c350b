"""torch.compile, layer by layer: the same code for every layer is compiled once."""

from __future__ import annotations

import torch
from torch import nn

from torchtune.modules import attend, grouped
from torchtune.modules.moe import Experts


def apply_compile(layers: nn.ModuleList) -> None:
    """Compile each layer in place; parameter names stay as they are.

    The token axis changes its length from batch to batch, so it is marked dynamic from the start. Activation
    checkpointing goes around it, afterwards: a checkpoint inside would keep the compiler from all of the layer.
    """
    attend.hide_from_compiler()
    grouped.hide_from_compiler()
    for layer in layers:
        for experts in [module for module in layer.modules() if isinstance(module, Experts)]:
            if "of_rows" in vars(experts):  # wrapped: rows go to other ranks, and the host must know how many
                experts.of_rows = torch.compiler.disable(experts.of_rows)  # type: ignore[method-assign]
        layer.forward = torch.compile(layer.forward, dynamic=True)
