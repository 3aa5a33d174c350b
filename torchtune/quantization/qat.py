"""Quantisation-aware training: the model computes with weights as they will be rounded, and trains those that are not.

Rounding has no gradient to speak of, so the gradient of the rounded weight is given to the one that was rounded
(straight through). What is rounded to is what `Scheme.encode` writes: the two share their code, so that a trained
model converted has the loss that it had while it was trained.

Source: Bengio et al., 2013 (arXiv:1308.3432), section 4; for language models Liu et al., 2023 (arXiv:2305.17888).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune.adapters.lora import LoRALinear
from torchtune.errors import UnsupportedError
from torchtune.modules.decoder import CausalLM
from torchtune.modules.linear import Linear, share_of
from torchtune.quantization.encoding import quantised_layers
from torchtune.quantization.schemes import Scheme


class RoundedLinear(Linear):
    """A linear layer that computes with its weight rounded; the weight itself is what is trained and saved.

    Attributes:
        scheme: how it will be quantised; None for a while in which it isn't rounded.
    """

    scheme: Scheme | None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in x's type."""
        if self.scheme is None:
            return super().forward(x)
        weight = _Rounded.apply(self.weight, self.scheme, x.dtype)
        bias = share_of(self.bias, self.bias_share)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


class _Rounded(torch.autograd.Function):
    """A weight as it will be rounded, in a type; its gradient is that of the rounded one."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
        ctx.dtype = weight.dtype
        return scheme.rounded(weight, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.to(ctx.dtype), None, None


def apply_qat(model: CausalLM, scheme: Scheme) -> list[str]:
    """Let the layers that `scheme` quantises compute with rounded weights; returns their names.

    Of a layer with a low-rank update what is rounded is the sum, which is what will be merged. Parameters stay what
    they are, and so do checkpoints. The model may be on the meta device.

    Raises:
        UnsupportedError, ConfigError: as `quantised_layers`; or an update that is no plain one.
    """
    layers = quantised_layers(model, scheme)
    for name, layer in layers.items():
        if isinstance(layer, LoRALinear):
            if layer.lora_magnitude_vector is not None or layer.dropout is not None:
                raise UnsupportedError(f"{name} has DoRA or dropout: what it computes is not what could be rounded")
            layer.rounding = scheme.rounded
            continue
        assert type(layer) is Linear, f"{name} is a {type(layer).__name__}"
        layer.__class__ = RoundedLinear
        layer.scheme = scheme  # type: ignore[assignment]  # a layer's attributes are parameters and modules to mypy
    return list(layers)


@contextmanager
def not_rounded(model: CausalLM) -> Iterator[None]:
    """Within this context a model of `apply_qat` computes with its weights as they are."""
    linear = {layer: layer.scheme for layer in model.modules() if isinstance(layer, RoundedLinear)}
    adapted = {layer: layer.rounding for layer in model.modules() if isinstance(layer, LoRALinear)}
    try:
        for layer in linear:
            layer.scheme = None
        for layer_with_update in adapted:
            layer_with_update.rounding = None
        yield
    finally:
        for layer, scheme in linear.items():
            layer.scheme = scheme
        for layer_with_update, rounding in adapted.items():
            layer_with_update.rounding = rounding
