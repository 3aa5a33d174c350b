"""Normalisation layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtune.distributed.collectives import sum_both_ways
from torchtune.distributed.mesh import Axis

FEW_VALUES = 2**15


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim, taken in float32. Source: Zhang & Sennrich, 2019 (arXiv:1910.07467).

    Args:
        from_one: the checkpoint stores the weight's distance from one (Gemma).

    Attributes:
        axis: ranks that hold equal shares of the last dim; rms(x) is over all of it.
    """

    def __init__(self, size: int, eps: float, *, from_one: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        if not self.weight.is_meta:
            nn.init.constant_(self.weight, 0.0 if from_one else 1.0)
        self.eps = eps
        self.from_one = from_one
        self.axis = Axis()

    def forward(self, x: Tensor) -> Tensor:
        # In float32: one and a small distance from it do not fit into half precision together.
        weight = self.weight.to(torch.promote_types(x.dtype, torch.float32)) + 1.0 if self.from_one else self.weight
        if self.axis.size > 1:
            return _rms_norm_over(self.axis, x, weight, self.eps)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            if not torch.is_grad_enabled():
                few = x.numel() <= FEW_VALUES and weight.dtype == x.dtype
                return rms_normed_few(x, weight, self.eps) if few else _rms_normed(x, weight, self.eps)[0]
            return _RMSNormFunction.apply(x, weight, self.eps)
        if self.from_one:
            return F.rms_norm(x.to(weight.dtype), weight.shape, weight, self.eps).to(x.dtype)
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), self.eps)


class PlainRMSNorm(nn.Module):
    """x / rms(x) over the last dim, taken in float32, without a weight (Llama 4's L2 norm)."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, wide.shape[-1:], eps=self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * weight + bias over the last dim, taken in float32. Source: arXiv:1607.06450.

    Args:
        size: the last dim, or (heads, head_dim) for a weight of its own for each head.
    """

    def __init__(self, size: int | tuple[int, ...], eps: float, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if bias else None
        if not self.weight.is_meta:
            nn.init.ones_(self.weight)
            if self.bias is not None:
                nn.init.zeros_(self.bias)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        weight, bias = self.weight.to(wide.dtype), None if self.bias is None else self.bias.to(wide.dtype)
        if weight.dim() == 1:
            return F.layer_norm(wide, weight.shape, weight, bias, self.eps).to(x.dtype)
        normed = F.layer_norm(wide, wide.shape[-1:], eps=self.eps) * weight
        return (normed if bias is None else normed + bias).to(x.dtype)


def _rms_norm_over(axis: Axis, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = sum_both_ways(wide.square().mean(-1, keepdim=True), axis) / axis.size
    return (wide * torch.rsqrt(mean + eps) * weight).to(x.dtype)


def _rms_normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x if x.dtype == torch.float64 else x.float()
    inv_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return (wide * inv_rms).mul_(weight).to(x.dtype), inv_rms


def rms_normed_few(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same of so few values that the number of operators is what takes time.

    (x, -x) has the mean zero and the variance mean(x^2): layer norm, which is one kernel, divides by rms(x).
    """
    size = x.shape[-1]
    return F.layer_norm(torch.cat((x, -x), dim=-1), (2 * size,), eps=eps)[..., :size] * weight


class _RMSNormFunction(torch.autograd.Function):
    """RMSNorm for the CPU, where torch composes it of many small operators and keeps what each one made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, inv_rms = _rms_normed(x, weight, eps)
        ctx.save_for_backward(x, weight, inv_rms)
        return normed

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, inv_rms = ctx.saved_tensors
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * inv_rms
        grad = grads[0].to(wide.dtype)
        grad_weight = (
            (grad * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        )
        grad_normed = grad * weight
        # d(x * r)/dx with r = (mean(x^2) + eps)^-1/2
        inner = (grad_normed * normed).mean(-1, keepdim=True)
        grad_x = grad_normed.sub_(normed.mul_(inner)).mul_(inv_rms)
        return grad_x.to(x.dtype), grad_weight, None
