"""torch.compile, layer by layer: the same code for every layer is compiled once."""

from __future__ import annotations

import torch
from torch import nn

from torchtune.modules.attend import hide_from_compiler


def apply_compile(layers: nn.ModuleList) -> None:
    """Compile each layer in place; parameter names stay as they are.

    The token axis changes its length from batch to batch, so it is marked dynamic from the start. Activation
    checkpointing goes around it, afterwards: a checkpoint inside would keep the compiler from all of the layer.
    """
    hide_from_compiler()
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)
