"""Products of activations with weights, by whichever of torch's libraries is quickest at them."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 16  # of an input: where reading the weight takes longer than what is done with it
PLAIN = (Tensor, nn.Parameter)  # neither packed nor sharded
X86 = ("x86_64", "amd64")
MANY_PRODUCTS = 2**25  # of single values: where choosing the faster library is worth what its call takes


def product(x: Tensor, weight: Tensor, bias: Tensor | None, laid_out: LaidOut | None) -> Tensor:
    """x @ weight.T + bias: x [..., in], weight [out, in] and bias [out], of x's type -> [..., out].

    Args:
        laid_out: a copy of the weight for few rows, if there is one.
    """
    if laid_out is not None and laid_out.serves(x, weight):
        return laid_out.product(x, bias)
    if x.dtype == torch.float32 and x.numel() * weight.shape[0] >= MANY_PRODUCTS and _is_for_onednn(x, weight):
        return _onednn_product(x, weight, bias)
    return F.linear(x, weight, bias)


def _onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return out


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN multiplies these float32 matrices faster than MKL, which torch would ask, and no gradient is asked for."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or type(weight) not in PLAIN:
        return False
    return not torch.compiler.is_compiling() and _is_amd()


@cache
def _is_amd() -> bool:
    """Whether the CPU is AMD's: MKL's kernels are made for Intel's."""
    info = Path("/proc/cpuinfo")
    return torch.backends.mkldnn.is_available() and info.exists() and "AuthenticAMD" in info.read_text()


@dataclass(frozen=True)
class LaidOut:
    """A copy of a weight in the order in which the CPU's kernel (oneDNN's) reads it.

    A plain bfloat16 weight the kernel puts in that order in each product, and of few rows that is most of the work; a
    plain float32 one is multiplied by MKL, in one thread if there is one row.

    Attributes:
        weight: in an order of the library's own.
        place: where the plain weight began, and how often it had been changed.
    """

    weight: Tensor
    place: tuple[int, object]

    @classmethod
    def of(cls, weight: Tensor) -> LaidOut | None:
        """A copy, where torch can make one: of a plain float32 matrix, or a bfloat16 one, on an x86 CPU that multiplies it."""
        if type(weight) not in PLAIN or weight.is_inference() or weight.device.type != "cpu":
            return None
        if platform.machine().lower() not in X86 or not torch.backends.mkldnn.is_available():
            return None
        if weight.dtype not in (torch.float32, torch.bfloat16):
            return None
        if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return None
        copy = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), FEW_ROWS)
        return cls(copy, place_of(weight))

    def serves(self, x: Tensor, weight: Tensor) -> bool:
        """Whether it is a copy of this weight as it is now, the rows are few and no gradient is asked for."""
        if torch.is_grad_enabled() or x.dim() != 2 or x.shape[0] > FEW_ROWS or x.dtype != weight.dtype:
            return False
        return place_of(weight) == self.place

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x @ weight.T + bias."""
        return _onednn_product(x, self.weight, bias)


def place_of(weight: Tensor) -> tuple[int, object]:
    """Where a weight begins in memory, and how often it has been changed: the same while it is what it was.

    Of one that was made in inference mode nobody counts the changes, and it is never the same.
    """
    return weight.data_ptr(), object() if weight.is_inference() else weight._version
