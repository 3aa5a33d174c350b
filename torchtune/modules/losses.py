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
    ) -> Tensor:
        """hidden [N, D], weight [V, D], targets [N] int64 -> float32 scalar (float64 for float64).

        Args:
            bias: [V], added to the logits.
            softcap: logits are held within it by softcap * tanh(logits / softcap).
        """
        return _LinearCrossEntropy.apply(hidden, weight, bias, targets, self.chunk_size, softcap)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
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
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros(weight.shape[0], dtype=wide, device=hidden.device) if needs_bias else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        # One buffer for all chunks: on the CPU a fresh one of this size costs more in page faults than its use.
        buffer = torch.empty(min(chunk_size, hidden.shape[0]), weight.shape[0], dtype=wide, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            labels = targets[rows, None]
            logits = buffer[: labels.shape[0]].copy_(hidden[rows] @ weight_cast.T)  # [n, V]
            if bias is not None:
                logits.add_(bias)
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
                slope = 1 - (logits / softcap).square()  # of the capped by the plain logit
            log_z = torch.logsumexp(logits, dim=-1, keepdim=True)
            total += (log_z - logits.gather(1, labels)).sum()
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            grad_logits = logits.sub_(log_z).exp_()
            grad_logits.scatter_add_(1, labels, torch.full_like(log_z, -1.0))
            if softcap is not None:
                grad_logits.mul_(slope)
            if grad_bias is not None:
                grad_bias.add_(grad_logits.sum(0))
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight_cast, out=grad_hidden[rows])
            if needs_weight:
                if grad_weight is None:
                    grad_weight = torch.zeros_like(weight)
                for first in range(0, weight.shape[0], VOCAB_SLICE):  # the whole product would be as large again
                    ids = slice(first, first + VOCAB_SLICE)
                    grad_weight[ids].add_(grad_logits[:, ids].T @ hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        # Scaled in float32 and in place: fp16's loss scale would overflow in the gradient's own type.
        hidden = None if grad_hidden is None else grad_hidden * grads[0].to(grad_hidden.dtype)
        weight = None if grad_weight is None else grad_weight.mul_(grads[0].to(grad_weight.dtype))
        bias = None if grad_bias is None else (grad_bias * grads[0]).to(ctx.bias_dtype)
        return hidden, weight, bias, None, None, None
