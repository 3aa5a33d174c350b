"""Rotary position embeddings.

A pair of dims of a head is turned by position x frequency: dims (i, i + H/2) in the half-rotated layout of
most checkpoints, dims (2i, 2i + 1) in the interleaved one. The kinds differ in how the frequencies are
stretched for contexts longer than those of pre-training. Source: Su et al., 2021 (arXiv:2104.09864); the
kinds' own sources are at their functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchtune.errors import CheckpointError, UnsupportedError, did_you_mean

FEW_TOKENS = 32


@dataclass(frozen=True)
class RotaryAngles:
    """cos and sin of a batch's positions: [T, 1, H_rot], for every head, made once and used by every layer.

    Attributes:
        sin: negative in the dims that come first in a pair, (x, y) -> (x cos - y sin, y cos + x sin).
        interleaved: pairs are neighbours.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    def turn(self, x: Tensor) -> Tensor:
        """Turn the heads of x, [T, heads, H], by each token's position; dims beyond H_rot pass through."""
        size = self.cos.shape[-1]
        rotated, passed = (x, None) if size == x.shape[-1] else (x[..., :size], x[..., size:])
        cos, sin = self.cos, self.sin
        if cos.dtype != x.dtype:
            cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        if self.interleaved:
            swapped = rotated.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        else:
            swapped = rotated.roll(size // 2, -1)
        turned = torch.addcmul(rotated * cos, swapped, sin)
        return turned if passed is None else torch.cat((turned, passed), dim=-1)

    def turn_both(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """`turn` of queries and keys, [T, heads, H]: of few tokens in one, for it is the operators that take time."""
        if torch.is_grad_enabled() or torch.compiler.is_exporting() or len(q) > FEW_TOKENS:
            return self.turn(q), self.turn(k)
        turned = self.turn(torch.cat((q, k), dim=1))
        return turned[:, : q.shape[1]], turned[:, q.shape[1] :]


@dataclass(eq=False)
class RotaryEmbedding:
    """Frequencies of a model, and the angles that they give at a batch's positions.

    No module and no buffer: it is computed from the config, so it is right on any device at any time,
    a model built on the meta device included.

    Attributes:
        inv_freq: [H_rot / 2] float32, on the CPU.
        attention_scaling: what cos and sin are multiplied by (yarn, longrope).
        for_length: the frequencies of a document by its length, for kinds that stretch long ones (dynamic,
            longrope). Each document of a batch has its own, so that its neighbours don't matter.
        interleaved: the layout of pairs.
    """

    inv_freq: Tensor
    attention_scaling: float = 1.0
    for_length: Callable[[int], Tensor] | None = None
    interleaved: bool = False

    def __post_init__(self) -> None:
        self._on_device: dict[torch.device, Tensor] = {}

    def turns_alike(self, one: int, other: int) -> bool:
        """Whether documents of these lengths have the same frequencies."""
        return self.for_length is None or torch.equal(self.for_length(one), self.for_length(other))

    def angles(
        self, positions: Tensor, dtype: torch.dtype, *, lengths: Sequence[int], reached: Sequence[int] | None = None
    ) -> RotaryAngles:
        """The angles at `positions` [T], in `dtype`.

        Taken in float32 and cast once, as transformers does; float64 models get float32's angles too.

        Args:
            lengths: tokens of each document here.
            reached: tokens of each document altogether, where it continues a cached one.
        """
        device = positions.device
        if self.for_length is not None:
            each = [self.for_length(length) for length in reached or lengths]
            if len(each) > 1:
                each = [torch.stack(each).repeat_interleave(torch.tensor(lengths), dim=0)]  # [T, H_rot / 2]
            inv_freq = each[0].to(device)
        elif torch.compiler.is_exporting():
            inv_freq = self.inv_freq.to(device)  # what is traced is not for keeping
        else:
            if device not in self._on_device:
                self._on_device[device] = self.inv_freq.to(device)
            inv_freq = self._on_device[device]
        angles = positions.float()[:, None, None] * inv_freq.unsqueeze(-2)  # [T, 1, H_rot / 2]
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        if self.interleaved:
            cos, sin = cos.repeat_interleave(2, dim=-1), torch.stack((-sin, sin), dim=-1).flatten(-2)
        else:
            cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return RotaryAngles(cos.to(dtype), sin.to(dtype), self.interleaved)


def build_rotary(
    rope: Mapping[str, Any], *, head_dim: int, max_position_embeddings: int, interleaved: bool = False
) -> RotaryEmbedding:
    """The rotary embedding that a config's `rope_parameters` describe.

    Args:
        rope: with `rope_type`, `rope_theta` and what the type needs, in the newer spelling.
        head_dim: size of a head; `partial_rotary_factor` of it is turned.
        max_position_embeddings: the model's context.
        interleaved: pairs are neighbouring dims.
    Raises:
        UnsupportedError: another `rope_type`.
        CheckpointError: a key that the type needs is absent.
    """
    kind = rope.get("rope_type", "default")
    if kind not in KINDS:
        raise UnsupportedError(f"rope_type '{kind}' is not supported{did_you_mean(kind, KINDS)}")
    size = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    # On the CPU even while a model is built on the meta device: these are numbers, not weights.
    with torch.device("cpu"):
        try:
            rotary = KINDS[kind](rope, size, max_position_embeddings)
        except KeyError as missing:
            raise CheckpointError(f"config.json: a rotary embedding of type '{kind}' needs {missing}") from missing
    rotary.interleaved = interleaved
    return rotary


def _inv_freq(theta: float | Tensor, size: int) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size))


def _default(rope: Mapping[str, Any], size: int, max_positions: int) -> RotaryEmbedding:
    return RotaryEmbedding(_inv_freq(rope["rope_theta"], size))


def _linear(rope: Mapping[str, Any], size: int, max_positions: int) -> RotaryEmbedding:
    """Positions divided by a factor. Source: Chen et al., 2023 (arXiv:2306.15595)."""
    return RotaryEmbedding(_inv_freq(rope["rope_theta"], size) / rope["factor"])


def _dynamic(rope: Mapping[str, Any], size: int, max_positions: int) -> RotaryEmbedding:
    """NTK-aware: the base grows with the longest position beyond the context."""
    base, factor = rope["rope_theta"], rope["factor"]

    def for_length(longest: int) -> Tensor:
        with torch.device("cpu"):
            # As a tensor, so that a traced program computes it of each length.
            length = torch.scalar_tensor(longest, dtype=torch.float64).clamp(min=max_positions)
            grown = base * ((factor * length / max_positions) - (factor - 1)) ** (size / (size - 2))
            return _inv_freq(grown, size)

    return RotaryEmbedding(for_length(0), for_length=for_length)


def _llama3(rope: Mapping[str, Any], size: int, max_positions: int) -> RotaryEmbedding:
    """Low frequencies divided by a factor, high ones kept, those between blended. Source: Llama 3.1's release."""
    inv_freq = _inv_freq(rope["rope_theta"], size)
    factor, original = rope["factor"], rope.get("original_max_position_embeddings") or max_positions
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    divided = torch.where(wavelength > original / low, inv_freq / factor, inv_freq)
    between = (wavelength >= original / high) & (wavelength <= original / low)
    return RotaryEmbedding(torch.where(between, blended, divided))


def _yarn(rope: Mapping[str, Any], size: int, max_positions: int) -> RotaryEmbedding:
    """Blends stretched and kept frequencies along a ramp. Source: Peng et al., 2023 (arXiv:2309.00071)."""
    base = rope["rope_theta"]
    original = rope.get("original_max_position_embeddings") or max_positions
    factor = rope.get("factor") or max_positions / original

    def attention_factor(scale: float, mscale: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0

    scaling = rope.get("attention_factor")
    if scaling is None:
        mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
        if mscale and mscale_all:
            scaling = attention_factor(factor, mscale) / attention_factor(factor, mscale_all)
        else:
            scaling = attention_factor(factor)

    def dim_of(num_rotations: float) -> float:
        return size * math.log(original / (num_rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dim_of(rope.get("beta_fast") or 32), dim_of(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    ramp = ((torch.arange(size // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequencies = base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    stretched, kept = 1.0 / (factor * frequencies), 1.0 / frequencies
    return RotaryEmbedding(stretched * ramp + kept * (1 - ramp), attention_scaling=float(scaling))


def _longrope(rope: Mapping[str, Any], size: int, max_positions: int) -> RotaryEmbedding:
    """A factor per frequency, one list within the original context, another beyond. Source: arXiv:2402.13753."""
    base = rope["rope_theta"]
    original = rope.get("original_max_position_embeddings") or max_positions
    factor = rope.get("factor") or max_positions / original
    scaling = rope.get("attention_factor")
    if scaling is None:
        scaling = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    frequencies = base ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size)
    short = 1.0 / (torch.tensor(rope["short_factor"], dtype=torch.float32) * frequencies)
    long = 1.0 / (torch.tensor(rope["long_factor"], dtype=torch.float32) * frequencies)

    def for_length(longest: int) -> Tensor:
        with torch.device("cpu"):
            return torch.where(torch.scalar_tensor(longest) > original, long, short)

    return RotaryEmbedding(short, float(scaling), for_length=for_length)


KINDS: dict[str, Callable[[Mapping[str, Any], int, int], RotaryEmbedding]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
