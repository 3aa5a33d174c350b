"""Linear and embedding layers as checkpoints need them: weights cast on the way, nothing drawn on the meta device."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """torch's linear layer; the weight is cast to the input's type on the way, its gradient comes back in its own."""

    def reset_parameters(self) -> None:
        """Draw fresh weights; on the meta device there are none, and asking for them loads half of torch."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Embedding(nn.Embedding):
    """torch's embedding."""

    def reset_parameters(self) -> None:
        """As `Linear.reset_parameters`."""
        if not self.weight.is_meta:
            super().reset_parameters()
