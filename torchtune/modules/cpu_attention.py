"""Attention over documents on the CPU: one autograd node, a path per document or per group of short ones.

Slicing q, k and v for each document under autograd would fill and add a whole tensor of zeros per slice in
the backward pass. In half precision torch's kernel spends most of a short document's time on anything but
products (bf16, 30 documents of 68 tokens, 9 heads of 64, forward and backward: 38 ms by the kernel a
document, 9.5 ms by plain products over a group), so documents of similar, small length go together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchtune.modules.documents import Documents

MAX_GROUPED_LENGTH = 128
LENGTH_STEP = 32  # documents of a group differ by less than this, which bounds the padding

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    scale: float,
    window: int | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """As `attend` in attend.py."""
    out: Tensor = _apply(q, k, v, documents, scale, window, sinks)
    return out


def hide_from_compiler() -> None:
    """Let torch.compile leave this node as it is. Not at import, where it would cost a second of loading dynamo."""
    global _apply
    _apply = torch.compiler.disable(_DocumentAttention.apply)


@dataclass(frozen=True)
class _Group:
    """Short documents, padded to one length.

    Attributes:
        index: [B x L] the token at each place; at padding any.
        is_token: [B x L] where there is one.
    """

    num_documents: int
    length: int
    index: Tensor
    is_token: Tensor


def _plan(documents: Documents, dtype: torch.dtype, *, may_group: bool) -> tuple[list[_Group], list[tuple[int, int]]]:
    """Which documents go together, and which alone."""
    if dtype not in (torch.bfloat16, torch.float16) or not may_group:
        return [], [span for span in documents.bounds if span[1] > span[0]]
    if "_cpu_plan" not in documents.__dict__:  # made once a batch, used by every layer
        buckets: dict[int, list[tuple[int, int]]] = {}
        alone = []
        for start, end in documents.bounds:
            if 0 < end - start <= MAX_GROUPED_LENGTH:
                buckets.setdefault((end - start - 1) // LENGTH_STEP, []).append((start, end))
            elif end > start:
                alone.append((start, end))
        documents.__dict__["_cpu_plan"] = ([_group(spans) for spans in buckets.values()], alone)
    plan: tuple[list[_Group], list[tuple[int, int]]] = documents.__dict__["_cpu_plan"]
    return plan


def _group(spans: list[tuple[int, int]]) -> _Group:
    length = max(end - start for start, end in spans)
    starts = torch.tensor([start for start, _ in spans])[:, None]
    lengths = torch.tensor([end - start for start, end in spans])[:, None]
    place = torch.arange(length)[None]
    is_token = place < lengths
    return _Group(len(spans), length, torch.where(is_token, starts + place, 0).flatten(), is_token.flatten())


class _DocumentAttention(torch.autograd.Function):
    """Letters: T packed tokens, Q query heads, K key/value heads, G = Q / K, H head_dim; B documents of length L."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Documents,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        groups, alone = _plan(documents, q.dtype, may_group=window is None and sinks is None)
        out = torch.empty_like(q)
        kept: list[Tensor] = []
        for group in groups:
            kept += _grouped_forward(q, k, v, group, scale, out)
        for start, end in alone:
            kept += _single_forward(q[start:end], k[start:end], v[start:end], scale, window, sinks, out[start:end])
        ctx.save_for_backward(q, k, v, out, sinks, *kept)
        ctx.plan, ctx.scale, ctx.window = (groups, alone), scale, window
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, out, sinks, *kept = ctx.saved_tensors
        grad = grads[0].contiguous()
        groups, alone = ctx.plan
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for group, weights in zip(groups, kept[: len(groups)], strict=True):
            _grouped_backward(grad, q, k, v, out, weights, group, ctx.scale, (dq, dk, dv))
        for (start, end), log_sum in zip(alone, kept[len(groups) :], strict=True):
            one = slice(start, end)
            parts = _single_backward(grad[one], q[one], k[one], v[one], out[one], log_sum, ctx.scale, ctx.window)
            for whole, part in zip((dq, dk, dv), parts, strict=True):
                whole[one] = part
        dsinks = None if sinks is None else _sinks_backward(grad, out, sinks, kept, alone)
        return dq, dk, dv, None, None, None, dsinks


def _heads_first(x: Tensor, group: _Group, num_kv_heads: int) -> Tensor:
    """[T, Q, H] -> [B K, G L, H]: the query heads that share a key head stand one after the other."""
    padded = x.index_select(0, group.index)
    padded = padded.view(group.num_documents, group.length, num_kv_heads, -1, x.shape[-1])
    return padded.permute(0, 2, 3, 1, 4).reshape(group.num_documents * num_kv_heads, -1, x.shape[-1])


def _tokens_first(x: Tensor, group: _Group, num_kv_heads: int, target: Tensor) -> None:
    """The inverse of `_heads_first`, written to the group's tokens in `target`."""
    x = x.view(group.num_documents, num_kv_heads, -1, group.length, x.shape[-1]).permute(0, 3, 1, 2, 4)
    flat = x.reshape(-1, *target.shape[1:])
    target.index_copy_(0, group.index[group.is_token], flat[group.is_token])


def _grouped_forward(q: Tensor, k: Tensor, v: Tensor, group: _Group, scale: float, out: Tensor) -> list[Tensor]:
    num_kv_heads, length = k.shape[1], group.length
    queries, keys, values = (_heads_first(x, group, num_kv_heads) for x in (q, k, v))
    scores = torch.bmm(queries, keys.transpose(1, 2)).float().mul_(scale)  # [B K, G L, L]
    # Padding stands behind a document's tokens, so the causal mask hides it from them.
    future = torch.ones(length, length, dtype=torch.bool).triu_(1)
    scores.view(len(queries), -1, length, length).masked_fill_(future, float("-inf"))
    weights = torch.softmax(scores, dim=-1).to(q.dtype)
    _tokens_first(torch.bmm(weights, values), group, num_kv_heads, out)
    return [weights]


def _grouped_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    weights: Tensor,
    group: _Group,
    scale: float,
    targets: tuple[Tensor, Tensor, Tensor],
) -> None:
    num_kv_heads = k.shape[1]
    queries, keys, values, output = (_heads_first(x, group, num_kv_heads) for x in (q, k, v, out))
    masked = grad.index_select(0, group.index).mul_(group.is_token[:, None, None])
    every = _Group(group.num_documents, group.length, torch.arange(len(masked)), group.is_token)
    grad_out = _heads_first(masked, every, num_kv_heads)
    grad_values = torch.bmm(weights.transpose(1, 2), grad_out)
    # Through the softmax: dS = P * (dP - sum(dO * O)).
    delta = (grad_out.float() * output.float()).sum(-1, keepdim=True)
    grad_scores = torch.bmm(grad_out, values.transpose(1, 2)).float().sub_(delta).mul_(weights).to(q.dtype)
    grad_queries = torch.bmm(grad_scores, keys).mul_(scale)
    grad_keys = torch.bmm(grad_scores.transpose(1, 2), queries).mul_(scale)
    for part, target in zip((grad_queries, grad_keys, grad_values), targets, strict=True):
        _tokens_first(part, group, num_kv_heads, target)


def _batched(x: Tensor, num_heads: int) -> Tensor:
    """[n, heads, H] -> [1, num_heads, n, H], key heads repeated for the query heads that share them."""
    x = x.transpose(0, 1)[None]
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)


def _window_mask(length: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
    if window is None or length <= window:
        return None
    place = torch.arange(length)
    hidden = (place[None] > place[:, None]) | (place[None] <= place[:, None] - window)
    return torch.zeros(length, length, dtype=dtype).masked_fill_(hidden, float("-inf"))[None, None]


def _single_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, sinks: Tensor | None, out: Tensor
) -> list[Tensor]:
    mask = _window_mask(len(q), window, q.dtype)
    queries, keys, values = (_batched(x, q.shape[1]) for x in (q, k, v))
    made, log_sum = _flash(queries, keys, values, 0.0, mask is None, attn_mask=mask, scale=scale)
    if sinks is not None:
        # A sink is one more key, without a value: the sum that weights are divided by grows, and nothing else does.
        # With the grown sum and the output made of it, the backward pass is the kernel's own.
        with_sink = torch.logaddexp(log_sum, sinks.to(log_sum.dtype)[:, None])
        made = made * (log_sum - with_sink).exp().unsqueeze(-1).to(made.dtype)
        log_sum = with_sink
    out.copy_(made[0].transpose(0, 1))
    return [log_sum]


def _single_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    mask = _window_mask(len(q), window, q.dtype)
    num_heads = q.shape[1]
    queries, keys, values, output, grad_out = (_batched(x, num_heads) for x in (q, k, v, out, grad))
    dq, dk, dv = _flash_backward(
        grad_out, queries, keys, values, output, log_sum, 0.0, mask is None, attn_mask=mask, scale=scale
    )
    dk, dv = (x[0].unflatten(0, (k.shape[1], -1)).sum(1).transpose(0, 1) for x in (dk, dv))
    return dq[0].transpose(0, 1), dk, dv


def _sinks_backward(
    grad: Tensor, out: Tensor, sinks: Tensor, log_sums: list[Tensor], spans: list[tuple[int, int]]
) -> Tensor:
    """[Q]: through the softmax, -P * sum(dO * O) summed over tokens, with P the sink's own weight."""
    total = torch.zeros_like(sinks, dtype=torch.promote_types(sinks.dtype, torch.float32))
    for (start, end), log_sum in zip(spans, log_sums, strict=True):
        delta = (grad[start:end] * out[start:end]).to(total.dtype).sum(-1).T  # [Q, n]
        total -= ((sinks.to(total.dtype)[:, None] - log_sum[0].to(total.dtype)).exp() * delta).sum(-1)
    return total.to(sinks.dtype)


_apply: Callable[..., Tensor] = _DocumentAttention.apply
