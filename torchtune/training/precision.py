"""What a run computes in: `dtype`. What it trains and steps: `param_dtype`.

Parameters rest in `param_dtype`. Inside `autocast(model, dtype)` the embedding hands on activations in
`dtype` and every layer computes in the type of its input, casting its weight on the way; gradients
arrive in `param_dtype`. FSDP2's mixed precision hands layers weights in `dtype` already, so the cast is
a no-op there and the numbers are the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from torchtune.errors import ConfigError, did_you_mean
from torchtune.modules.dtypes import DTYPES

if TYPE_CHECKING:
    from torchtune.modules.decoder import CausalLM


def get_dtype(dtype: str | None = None, device: torch.device | None = None) -> torch.dtype:
    """The torch dtype of a short name.

    Args:
        dtype: `fp32`, `bf16`, `fp16`, `fp64`, or `auto`: bf16 where `device` multiplies it faster than
            fp32, else fp32. None means fp32.
        device: read for `auto`; None means the CPU.
    Raises:
        ConfigError: another name.
    """
    if dtype is None:
        return torch.float32
    if dtype == "auto":
        return torch.bfloat16 if has_fast_bf16(device or torch.device("cpu")) else torch.float32
    if dtype not in DTYPES:
        raise ConfigError(f"'{dtype}' is no dtype{did_you_mean(dtype, [*DTYPES, 'auto'])}", key="dtype")
    return DTYPES[dtype]


def dtype_name(dtype: torch.dtype) -> str:
    """The short name of a torch dtype: the inverse of `get_dtype`."""
    return next(name for name, value in DTYPES.items() if value == dtype)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 in hardware; without that it can be hundreds of times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


class autocast:  # named like torch's own context of this kind
    """Compute in `dtype` within the context, whatever the parameters' type. May be entered again and again."""

    def __init__(self, model: CausalLM, dtype: torch.dtype) -> None:
        self._model = model
        self._dtype = dtype

    def __enter__(self) -> None:
        self._before = self._model.compute_dtype
        self._model.compute_dtype = self._dtype

    def __exit__(self, *exception: object) -> None:
        self._model.compute_dtype = self._before


def stochastic_round_(target: torch.Tensor, source: torch.Tensor, generator: torch.Generator | None = None) -> None:
    """Write float32 `source` into bfloat16 `target`, up or down with the probability that keeps the mean.

    Rounding to nearest would lose every update smaller than half a step of bf16, which at fine-tuning
    rates is most of them. Source: Gupta et al., 2015 (arXiv:1502.02551).
    """
    bits = source.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    # bf16 is float32's upper half: adding noise below it and cutting carries with the right probability.
    rounded = ((bits + noise) & -65536).view(torch.float32)
    target.copy_(torch.where(torch.isfinite(source), rounded, source))
