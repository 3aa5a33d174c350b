"""Normalisation layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim, taken in float32. Source: Zhang & Sennrich, 2019 (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        if not self.weight.is_meta:
            nn.init.ones_(self.weight)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _RMSNormFunction.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class _RMSNormFunction(torch.autograd.Function):
    """RMSNorm for the CPU, where torch composes it of many small operators and keeps what each one made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        inv_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, inv_rms)
        return (wide * inv_rms).mul_(weight).to(x.dtype)

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
