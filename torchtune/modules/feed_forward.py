"""Feed-forward blocks: gated, and plain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtune.modules.activations import ACTIVATIONS
from torchtune.modules.linear import Linear, has_hooks, linear_group
from torchtune.modules.naming import Block
from torchtune.modules.packed import dense


class FeedForward(Block):
    """down(act(gate(x)) * up(x)). Source: Shazeer, 2020 (arXiv:2002.05202).

    Args:
        fused: gate and up are one matrix, `gate_up_proj`, the gate's rows first (Phi-3, GLM).
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "silu",
        bias: bool = False,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, bias=bias)
        else:
            self.gate_proj = Linear(hidden_size, intermediate_size, bias=bias)
            self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = linear_group([self.gate_proj, self.up_proj], x)
        if self.activation is not F.silu:
            return self.down_proj(self.activation(gate) * up)
        return linear_of_silu_product(self.down_proj, gate, up)


class PlainFeedForward(Block):
    """down(act(up(x))), without a gate.

    Args:
        linear: the kind of layer; GPT-2 has its own.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str,
        bias: bool = True,
        linear: type[nn.Module] = Linear,
    ) -> None:
        super().__init__()
        self.up_proj = linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = linear(intermediate_size, hidden_size, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))


def linear_of_silu_product(down: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """down(silu(gate) * up), the product not kept where the layer knows how (`of_silu_product`) and has no hook."""
    if torch.is_grad_enabled() and not has_hooks(down):
        if type(down) is Linear and down.bias is None:
            return _SiluProductLinear.apply(gate, up, down.weight)
        of_silu_product: Callable[[Tensor, Tensor], Tensor] | None = getattr(down, "of_silu_product", None)
        if of_silu_product is not None:
            return of_silu_product(gate, up)
    return down(silu_product(gate, up))


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of the same shape, with nothing kept but the two."""
    if not torch.is_grad_enabled():
        return F.silu(gate).mul_(up)
    product: Tensor = _SiluProduct.apply(gate, up)
    return product


class _SiluProduct(torch.autograd.Function):
    """silu(gate) * up, of the same shape; silu(gate) is computed again in the backward pass and not kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return silu_product_backward(grad, *ctx.saved_tensors)


class _SiluProductLinear(torch.autograd.Function):
    """(silu(gate) * up) @ weight.T, the weight cast on the way; the product is not kept either.

    gate, up [..., D_ff], weight [D, D_ff] -> [..., D].
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate) * up, dense(weight, gate.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gate, up, weight = ctx.saved_tensors
        grad_weight = None
        if ctx.needs_input_grad[2]:
            product = (F.silu(gate) * up).flatten(0, -2)
            grad_weight = (grad.flatten(0, -2).T @ product).to(weight.dtype)
        return *silu_product_backward(grad @ dense(weight, grad), gate, up), grad_weight


def silu_product_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up from that of silu(gate) * up."""
    grad_gate: Tensor = torch.ops.aten.silu_backward(grad * up, gate)
    return grad_gate, grad * F.silu(gate)
