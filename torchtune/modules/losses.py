"""The cross-entropy, together with the projection onto the vocabulary that comes before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

IGNORE_INDEX = -100
VOCAB_SLICE = 16384


class LinearCrossEntropy(nn.Module):
    """Sum of -log softmax(hidden @ weight.T)[target] over all rows, the logits never whole in memory.

    Letters: N rows, D hidden_size, V vocab_size. Rows are taken in chunks; each chunk's gradient is made
    right after its loss, while its logits are at hand, so no product is computed twice.

    Args:
        chunk_size: rows whose logits exist at a time.
    """

    def __init__(self, chunk_size: int = 256) -> None:
        super().__init__()
        self.chunk_size = chunk_size

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        bias: Tensor | None = None,
        softcap: float | None = None,
        low_rank: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """hidden [N, D], weight [V, D], targets [N] int64 -> float32 scalar (float64 for float64).

        Args:
            bias: [V], added to the logits.
            softcap: logits are held within it by softcap * tanh(logits / softcap).
            low_rank: u [N, r] and b [V, r] in hidden's type; u b^T is added to the logits.
        """
        update = low_rank or (None, None)
        return _LinearCrossEntropy.apply(hidden, weight, bias, *update, targets, self.chunk_size, softcap)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low: Tensor | None,
        up: Tensor | None,
        targets: Tensor,
        chunk_size: int,
        softcap: float | None,
    ) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        weight_cast = weight.to(hidden.dtype)
        # needs_input_grad is set in evaluation too; gradients are made only where backward can come.
        needs_hidden = ctx.needs_input_grad[0] and hidden.requires_grad
        needs_weight = ctx.needs_input_grad[1] and weight.requires_grad
        needs_bias = bias is not None and ctx.needs_input_grad[2] and bias.requires_grad
        needs_low = ctx.needs_input_grad[3] and low is not None and low.requires_grad
        needs_up = ctx.needs_input_grad[4] and up is not None and up.requires_grad
        grad_low = torch.empty_like(low) if low is not None and needs_low else None
        grad_up = torch.zeros(up.shape, dtype=wide, device=up.device) if up is not None and needs_up else None
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros(weight.shape[0], dtype=wide, device=hidden.device) if needs_bias else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        # Two buffers for all chunks: on the CPU a fresh one of this size costs more in page faults than its use.
        shape = (min(chunk_size, hidden.shape[0]), weight.shape[0])
        buffer = torch.empty(shape, dtype=wide, device=hidden.device)
        narrow_buffer = buffer if hidden.dtype == wide else torch.empty(shape, dtype=hidden.dtype, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            labels = targets[rows, None]
            logits, narrow = buffer[: labels.shape[0]], narrow_buffer[: labels.shape[0]]  # [n, V]
            torch.mm(hidden[rows], weight_cast.T, out=narrow)
            if low is not None and up is not None:
                narrow.addmm_(low[rows], up.T)
            if narrow_buffer is not buffer:
                logits.copy_(narrow)
            if bias is not None:
                logits.add_(bias)
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
                slope = 1 - (logits / softcap).square()  # of the capped by the plain logit
            largest, of_targets = logits.amax(-1, keepdim=True), logits.gather(1, labels)
            sums = logits.sub_(largest).exp_().sum(-1, keepdim=True)
            total += (sums.log() + largest - of_targets).sum()
            if not any((needs_hidden, needs_weight, needs_bias, needs_low, needs_up)):
                continue
            grad_logits = logits.div_(sums)
            grad_logits.scatter_add_(1, labels, torch.full_like(sums, -1.0))
            if softcap is not None:
                grad_logits.mul_(slope)
            if grad_bias is not None:
                grad_bias.add_(grad_logits.sum(0))
            grad_logits = grad_logits if narrow_buffer is buffer else narrow.copy_(grad_logits)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight_cast, out=grad_hidden[rows])
            if grad_low is not None and up is not None:
                torch.mm(grad_logits, up, out=grad_low[rows])
            if grad_up is not None and low is not None:
                grad_up.add_(grad_logits.T @ low[rows])
            if needs_weight:
                if grad_weight is None:
                    grad_weight = torch.zeros_like(weight)
                for first in range(0, weight.shape[0], VOCAB_SLICE):  # the whole product would be as large again
                    ids = slice(first, first + VOCAB_SLICE)
                    grad_weight[ids].add_(grad_logits[:, ids].T @ hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, grad_low, grad_up)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.hidden_dtype = hidden.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_hidden, grad_weight, grad_bias, grad_low, grad_up = ctx.saved_tensors
        # Scaled in float32 and in place: fp16's loss scale would overflow in the gradient's own type.
        hidden, low = (None if grad is None else grad * grads[0].to(grad.dtype) for grad in (grad_hidden, grad_low))
        up = None if grad_up is None else (grad_up * grads[0]).to(ctx.hidden_dtype)
        weight = None if grad_weight is None else grad_weight.mul_(grads[0].to(grad_weight.dtype))
        bias = None if grad_bias is None else (grad_bias * grads[0]).to(ctx.bias_dtype)
        return hidden, weight, bias, low, up, None, None, None
