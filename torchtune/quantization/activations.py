"""Layers whose input is rounded as well, token by token, as readers of `int8_dynamic` and `fp8_dynamic` do it.

The products stay products of floats: the numbers are those of the integers', the speed is not.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from torchtune.quantization.schemes import FP8, FP8_MAX, Scheme

INT8_STEPS = 255


def apply_activation_rounding(model: nn.Module, scheme: Scheme, names: Iterable[str]) -> None:
    """Round what goes into the layers of these names, if the scheme does so."""
    if scheme.rounds_activations:
        for name in names:
            model.get_submodule(name).register_forward_pre_hook(partial(_round_first, scheme))


def rounded_activations(x: Tensor, scheme: Scheme) -> Tensor:
    """x [..., in] with each row rounded to 8 bits of its own scale, in its own type."""
    largest = x.abs().amax(dim=-1, keepdim=True)
    if scheme.is_float:
        scale = (largest / FP8_MAX).clamp(min=torch.finfo(x.dtype).tiny)
        return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8).to(x.dtype) * scale
    scale = (largest / (INT8_STEPS / 2)).clamp(min=torch.finfo(x.dtype).tiny)
    return (x / scale).round().clamp(-128, 127) * scale


def _round_first(scheme: Scheme, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (rounded_activations(inputs[0], scheme), *inputs[1:])
