"""Quantisation-aware training: the model computes with weights as they will be rounded, and trains those that are not.

Rounding has no gradient to speak of, so the gradient of the rounded weight is given to the one that was rounded
(straight through). What is rounded to is what `Scheme.encode` writes: the two share their code, so that a trained
model converted has the loss that it had while it was trained.

Source: Bengio et al., 2013 (arXiv:1308.3432), section 4; for language models Liu et al., 2023 (arXiv:2305.17888).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune.errors import UnsupportedError
from torchtune.modules.decoder import CausalLM
from torchtune.modules.linear import Linear, share_of
from torchtune.quantization.encoding import quantised_layers
from torchtune.quantization.schemes import Scheme


class RoundedLinear(Linear):
    """A linear layer that computes with its weight rounded; the weight itself is what is trained and saved.

    Attributes:
        scheme: how it will be quantised.
    """

    scheme: Scheme

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in x's type."""
        weight = _Rounded.apply(self.weight, self.scheme)
        bias = share_of(self.bias, self.bias_share)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class _Rounded(torch.autograd.Function):
    """A weight as it will be rounded; its gradient is that of the rounded one."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scheme: Scheme) -> Tensor:
        return scheme.rounded(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def apply_qat(model: CausalLM, scheme: Scheme) -> list[str]:
    """Let the layers that `scheme` quantises compute with rounded weights; returns their names.

    Parameters stay what they are, and so do checkpoints. The model may be on the meta device.

    Raises:
        UnsupportedError, ConfigError: as `quantised_layers`; or a layer of another kind, an adapter's.
    """
    layers = quantised_layers(model, scheme)
    for name, layer in layers.items():
        if type(layer) is not Linear:
            raise UnsupportedError(f"{name} is a {type(layer).__name__}, whose weight can't be trained as rounded")
        layer.__class__ = RoundedLinear
        layer.scheme = scheme  # type: ignore[assignment]  # a layer's attributes are parameters and modules to mypy
    return list(layers)
