"""What makes a built model quicker at a token at a time, and changes none of its numbers or names."""

from __future__ import annotations

from torch import nn

from torchtune.modules.attention import Attention
from torchtune.modules.feed_forward import FeedForward
from torchtune.modules.linear import join


def join_projections(model: nn.Module) -> None:
    """Lay queries', keys' and values' weights together, and gate's and up's: two products a layer for five.

    Args:
        model: with its weights.
    """
    for module in model.modules():
        if isinstance(module, Attention) and module.fused is None:
            join([module.q_proj, module.k_proj, module.v_proj])
        elif isinstance(module, FeedForward) and not module.fused:
            join([module.gate_proj, module.up_proj])
