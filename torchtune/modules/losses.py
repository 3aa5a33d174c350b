"""The cross-entropy, together with the projection onto the vocabulary that comes before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchtune.distributed.collectives import gather
from torchtune.modules.vocabulary import VocabularyShare

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
        vocabulary: VocabularyShare | None = None,
    ) -> Tensor:
        """hidden [N, D], weight [V, D], targets [N] int64 -> float32 scalar (float64 for float64).

        Args:
            bias: [V], added to the logits.
            softcap: logits are held within it by softcap * tanh(logits / softcap).
            low_rank: u [N, r] and b [V, r] in hidden's type; u b^T is added to the logits.
            vocabulary: weight, bias and b have these rows alone. All ranks get the loss over the whole vocabulary,
                and of hidden and u the gradient that comes from their own rows: the sum over ranks is the whole.
        """
        update = low_rank or (None, None)
        return _LinearCrossEntropy.apply(hidden, weight, bias, *update, targets, self.chunk_size, softcap, vocabulary)


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
        vocabulary: VocabularyShare | None,
    ) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        weight_cast = weight.to(hidden.dtype)
        # needs_input_grad is set in evaluation too; gradients are made only where backward can come.
        inputs = (hidden, weight, bias, low, up)
        needed = [
            needs and tensor is not None and tensor.requires_grad
            for needs, tensor in zip(ctx.needs_input_grad, inputs, strict=False)
        ]
        gradients = _Gradients(hidden, weight, weight_cast, low, up, needed, wide)
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
            total += _softmax_loss_(logits, labels, softcap, vocabulary, into_gradient=any(needed))
            if any(needed):
                gradients.add(rows, logits, logits if narrow_buffer is buffer else narrow.copy_(logits))
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias, gradients.low, gradients.up)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.hidden_dtype, ctx.weight_dtype = hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_hidden, grad_weight, grad_bias, grad_low, grad_up = ctx.saved_tensors
        # Scaled in float32 and in place: fp16's loss scale would overflow in the gradient's own type.
        hidden, low = (None if grad is None else grad * grads[0].to(grad.dtype) for grad in (grad_hidden, grad_low))
        up = None if grad_up is None else (grad_up * grads[0]).to(ctx.hidden_dtype)
        weight = None if grad_weight is None else grad_weight.mul_(grads[0]).to(ctx.weight_dtype)
        bias = None if grad_bias is None else (grad_bias * grads[0]).to(ctx.bias_dtype)
        return hidden, weight, bias, low, up, None, None, None, None


def _softmax_loss_(
    logits: Tensor, labels: Tensor, softcap: float | None, vocabulary: VocabularyShare | None, *, into_gradient: bool
) -> Tensor:
    """The summed cross-entropy of logits [n, V] at labels [n, 1].

    What stands in `logits` afterwards is its gradient by them as they came, or nothing of use.
    """
    slope = None
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
        slope = 1 - (logits / softcap).square() if into_gradient else None  # of the capped by the plain logit
    place, is_held = (labels, None) if vocabulary is None else vocabulary.places(labels)
    largest, of_labels = logits.amax(-1, keepdim=True), logits.gather(1, place)
    sums = divisor = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    of_label = torch.full_like(sums, -1.0)
    if vocabulary is not None and is_held is not None:
        of_label *= is_held
        own_largest = largest
        largest, sums, of_labels = _over_ranks(largest, sums, of_labels * is_held, vocabulary)
        divisor = sums * (largest - own_largest).exp()
    if into_gradient:
        logits.div_(divisor).scatter_add_(1, place, of_label)
    if slope is not None:
        logits.mul_(slope)
    return (sums.log() + largest - of_labels).sum()


def _over_ranks(
    largest: Tensor, sums: Tensor, of_labels: Tensor, vocabulary: VocabularyShare
) -> tuple[Tensor, Tensor, Tensor]:
    """The same three [n, 1] for the logits of all ranks, by one collective.

    Args:
        sums: of exp(logit - largest).
        of_labels: the label's logit on the rank that has it, 0 elsewhere.
    """
    every = gather(torch.cat((largest, sums, of_labels), dim=1), vocabulary.axis).unflatten(0, (-1, len(sums)))
    largest_of, sums_of, labels_of = every.split(1, dim=2)  # [ranks, n, 1]
    largest = largest_of.amax(0)
    return largest, (sums_of * (largest_of - largest).exp()).sum(0), labels_of.sum(0)


class _Gradients:
    """Those of hidden, weight, bias, low and up, as far as they are `needed`, chunk by chunk."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        weight_cast: Tensor,
        low: Tensor | None,
        up: Tensor | None,
        needed: Sequence[bool],
        wide: torch.dtype,
    ) -> None:
        self._of = hidden, weight_cast, low, up
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        # A sum over chunks: in the type of narrow weights each addition would be rounded.
        self.weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needed[1] else None
        self.bias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if needed[2] else None
        self.low = torch.empty_like(low) if low is not None and needed[3] else None
        self.up = torch.zeros(up.shape, dtype=wide, device=up.device) if up is not None and needed[4] else None

    def add(self, rows: slice, wide: Tensor, narrow: Tensor) -> None:
        """What comes of these rows' logits, whose gradient [n, V] is given in both types."""
        hidden, weight, low, up = self._of
        if self.bias is not None:
            self.bias.add_(wide.sum(0))
        if self.hidden is not None:
            torch.mm(narrow, weight, out=self.hidden[rows])
        if self.low is not None and up is not None:
            torch.mm(narrow, up, out=self.low[rows])
        if self.up is not None and low is not None:
            self.up.add_(narrow.T @ low[rows])
        if self.weight is not None:
            for first in range(0, weight.shape[0], VOCAB_SLICE):  # the whole product would be as large again
                ids = slice(first, first + VOCAB_SLICE)
                self.weight[ids].add_(narrow[:, ids].T @ hidden[rows])
