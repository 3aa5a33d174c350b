"""Activation checkpointing: keep a layer's input alone, and compute the rest again in the backward pass."""

from __future__ import annotations

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint


def apply_activation_checkpointing(layers: nn.ModuleList) -> None:
    """Make each layer recompute its inside in the backward pass. Changes no number and no parameter name.

    The forward is wrapped on the instance, not the module in another, so `state_dict` keeps its names.
    Source: Chen et al., 2016 (arXiv:1604.06174).
    """
    for layer in layers:
        # Non-reentrant: parameters that the checkpointed inputs don't lead to (adapters behind a frozen
        # embedding) get their gradients too. The random state is kept only where dropout would need it.
        has_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in layer.modules())
        layer.forward = functools.partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=has_dropout
        )
