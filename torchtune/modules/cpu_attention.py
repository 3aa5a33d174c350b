"""Attention over documents on the CPU: one autograd node, a path per document or per group of short ones.

Slicing q, k and v for each document under autograd would fill and add a whole tensor of zeros per slice in
the backward pass. In half precision torch's kernel spends most of a short document's time on anything but
products (bf16, 30 documents of 68 tokens, 9 heads of 64, forward and backward: 38 ms by the kernel a
document, 9.5 ms by plain products over a group), so documents of similar, small length go together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

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
    keys: Documents,
    scale: float,
    window: int | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """As `attend` in attend.py; the tokens of each document are the last of those that `keys` has of it."""
    out: Tensor = _DocumentAttention.apply(q, k, v, documents, keys, scale, window, sinks)
    return out


class _Span(NamedTuple):
    """A document: where its queries lie, and where the keys."""

    queries: slice
    keys: slice


@dataclass(frozen=True)
class _Group:
    """Short documents with as many keys as queries, padded to one length.

    Attributes:
        index: [B x L] the query at each place; at padding any.
        keys: [B x L] the key.
        is_token: [B x L] where there is one.
    """

    num_documents: int
    length: int
    index: Tensor
    keys: Tensor
    is_token: Tensor


_Plan = tuple[list[_Group], list[_Span]]


def _plan(documents: Documents, keys: Documents, dtype: torch.dtype, *, may_group: bool) -> _Plan:
    """Which documents go together, and which alone."""
    # Made once a batch, used by every layer; of the keys, which may be other ones where there is a window.
    plans: dict[bool, _Plan] = keys.__dict__.setdefault("_cpu_plans", {})
    may_group = may_group and dtype in (torch.bfloat16, torch.float16)
    if may_group not in plans:
        buckets: dict[int, list[_Span]] = {}
        alone = []
        for span in (_Span(slice(*own), slice(*seen)) for own, seen in zip(documents.bounds, keys.bounds, strict=True)):
            length, num_keys = (part.stop - part.start for part in span)
            if may_group and 0 < length == num_keys <= MAX_GROUPED_LENGTH:
                buckets.setdefault((length - 1) // LENGTH_STEP, []).append(span)
            elif length > 0:
                alone.append(span)
        plans[may_group] = ([_group(spans) for spans in buckets.values()], alone)
    return plans[may_group]


def _group(spans: list[_Span]) -> _Group:
    lengths = torch.tensor([span.queries.stop - span.queries.start for span in spans])[:, None]
    place = torch.arange(int(lengths.max()))[None]
    is_token = place < lengths
    index, keys = (
        torch.where(is_token, torch.tensor([part.start for part in parts])[:, None] + place, 0).flatten()
        for parts in zip(*spans, strict=True)
    )
    return _Group(len(spans), place.shape[1], index, keys, is_token.flatten())


class _DocumentAttention(torch.autograd.Function):
    """Letters: T packed tokens, Q query heads, K key/value heads, G = Q / K, H head_dim; B documents of length L.

    A document's n queries are the last of its m keys.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Documents,
        keys: Documents,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        groups, alone = _plan(documents, keys, q.dtype, may_group=window is None and sinks is None)
        out = torch.empty_like(q)
        kept: list[Tensor] = []
        for group in groups:
            kept += _grouped_forward(q, k, v, group, scale, out)
        for here, seen in alone:
            kept += _single_forward(q[here], k[seen], v[seen], scale, window, sinks, out[here])
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
        for (here, seen), log_sum in zip(alone, kept[len(groups) :], strict=True):
            dq[here], dk[seen], dv[seen] = _single_backward(
                grad[here], q[here], k[seen], v[seen], out[here], log_sum, ctx.scale, ctx.window
            )
        dsinks = None if sinks is None else _sinks_backward(grad, out, sinks, kept, alone)
        return dq, dk, dv, None, None, None, None, dsinks


def _heads_first(x: Tensor, index: Tensor, group: _Group, num_kv_heads: int) -> Tensor:
    """[T, Q, H] -> [B K, G L, H]: the query heads that share a key head stand one after the other."""
    padded = x.index_select(0, index)
    padded = padded.view(group.num_documents, group.length, num_kv_heads, -1, x.shape[-1])
    return padded.permute(0, 2, 3, 1, 4).reshape(group.num_documents * num_kv_heads, -1, x.shape[-1])


def _tokens_first(x: Tensor, index: Tensor, group: _Group, num_kv_heads: int, target: Tensor) -> None:
    """The inverse of `_heads_first`, written to the group's tokens in `target`."""
    x = x.view(group.num_documents, num_kv_heads, -1, group.length, x.shape[-1]).permute(0, 3, 1, 2, 4)
    flat = x.reshape(-1, *target.shape[1:])
    target.index_copy_(0, index[group.is_token], flat[group.is_token])


def _grouped_forward(q: Tensor, k: Tensor, v: Tensor, group: _Group, scale: float, out: Tensor) -> list[Tensor]:
    num_kv_heads, length = k.shape[1], group.length
    queries = _heads_first(q, group.index, group, num_kv_heads)
    keys, values = (_heads_first(x, group.keys, group, num_kv_heads) for x in (k, v))
    scores = torch.bmm(queries, keys.transpose(1, 2)).float().mul_(scale)  # [B K, G L, L]
    # Padding stands behind a document's tokens, so the causal mask hides it from them.
    future = torch.ones(length, length, dtype=torch.bool).triu_(1)
    scores.view(len(queries), -1, length, length).masked_fill_(future, float("-inf"))
    weights = torch.softmax(scores, dim=-1).to(q.dtype)
    _tokens_first(torch.bmm(weights, values), group.index, group, num_kv_heads, out)
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
    queries, output = (_heads_first(x, group.index, group, num_kv_heads) for x in (q, out))
    keys, values = (_heads_first(x, group.keys, group, num_kv_heads) for x in (k, v))
    masked = grad.index_select(0, group.index).mul_(group.is_token[:, None, None])
    grad_out = _heads_first(masked, torch.arange(len(masked)), group, num_kv_heads)
    grad_values = torch.bmm(weights.transpose(1, 2), grad_out)
    # Through the softmax: dS = P * (dP - sum(dO * O)).
    delta = (grad_out.float() * output.float()).sum(-1, keepdim=True)
    grad_scores = torch.bmm(grad_out, values.transpose(1, 2)).float().sub_(delta).mul_(weights).to(q.dtype)
    grad_queries = torch.bmm(grad_scores, keys).mul_(scale)
    grad_keys = torch.bmm(grad_scores.transpose(1, 2), queries).mul_(scale)
    made = zip((grad_queries, grad_keys, grad_values), (group.index, group.keys, group.keys), targets, strict=True)
    for part, index, target in made:
        _tokens_first(part, index, group, num_kv_heads, target)


def _batched(x: Tensor, num_heads: int) -> Tensor:
    """[n, heads, H] -> [1, num_heads, n, H], key heads repeated for the query heads that share them."""
    x = x.transpose(0, 1)[None]
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)


def _window_mask(num_queries: int, num_keys: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
    if window is None or num_keys <= window:
        return None
    place = torch.arange(num_keys)
    own = place[num_keys - num_queries :, None]
    hidden = (place > own) | (place <= own - window)  # [n, m]
    return torch.zeros(num_queries, num_keys, dtype=dtype).masked_fill_(hidden, float("-inf"))[None, None]


def _single_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, sinks: Tensor | None, out: Tensor
) -> list[Tensor]:
    mask = _window_mask(len(q), len(k), window, q.dtype)
    queries, keys, values = (_batched(x, q.shape[1]) for x in (q, k, v))
    num_past = len(k) - len(q)
    if mask is None and num_past > 0:
        made, log_sum = _past_forward(queries, keys, values, num_past, scale)
    else:
        made, log_sum = _flash(queries, keys, values, 0.0, mask is None, attn_mask=mask, scale=scale)
    if sinks is not None:
        # A sink is one more key, without a value: the sum that weights are divided by grows, and nothing else does.
        # With the grown sum and the output made of it, the backward pass is the kernel's own.
        with_sink = torch.logaddexp(log_sum, sinks.to(log_sum.dtype)[:, None])
        made = made * (log_sum - with_sink).exp().unsqueeze(-1).to(made.dtype)
        log_sum = with_sink
    out.copy_(made[0].transpose(0, 1))
    return [log_sum]


def _past_forward(queries: Tensor, keys: Tensor, values: Tensor, num_past: int, scale: float) -> tuple[Tensor, Tensor]:
    """All of the past is seen and needs no mask, the rest is causal: two outputs, weighed by the sums of each."""
    past, own = slice(num_past), slice(num_past, None)
    of_past, sum_past = _flash(queries, keys[:, :, past], values[:, :, past], 0.0, False, scale=scale)
    of_own, sum_own = _flash(queries, keys[:, :, own], values[:, :, own], 0.0, True, scale=scale)
    log_sum = torch.logaddexp(sum_past, sum_own)
    share_past, share_own = ((part - log_sum).exp().unsqueeze(-1).to(of_own.dtype) for part in (sum_past, sum_own))
    return of_past * share_past + of_own * share_own, log_sum


def _single_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    mask = _window_mask(len(q), len(k), window, q.dtype)
    num_heads, num_past = q.shape[1], len(k) - len(q)
    queries, keys, values, output, grad_out = (_batched(x, num_heads) for x in (q, k, v, out, grad))

    def through(keys: Tensor, values: Tensor, is_causal: bool) -> Any:
        """The gradients by way of these keys: with the sum over all keys they are shares, and add up."""
        some = (queries, keys, values, output, log_sum)
        return _flash_backward(grad_out, *some, 0.0, is_causal, attn_mask=mask, scale=scale)

    if mask is None and num_past > 0:
        past, own = slice(num_past), slice(num_past, None)
        of_past = through(keys[:, :, past], values[:, :, past], False)
        of_own = through(keys[:, :, own], values[:, :, own], True)
        dq = of_past[0] + of_own[0]
        dk, dv = (torch.cat(both, dim=2) for both in zip(of_past[1:], of_own[1:], strict=True))
    else:
        dq, dk, dv = through(keys, values, mask is None)
    dk, dv = (x[0].unflatten(0, (k.shape[1], -1)).sum(1).transpose(0, 1) for x in (dk, dv))
    return dq[0].transpose(0, 1), dk, dv


def _sinks_backward(grad: Tensor, out: Tensor, sinks: Tensor, log_sums: list[Tensor], spans: list[_Span]) -> Tensor:
    """[Q]: through the softmax, -P * sum(dO * O) summed over tokens, with P the sink's own weight."""
    total = torch.zeros_like(sinks, dtype=torch.promote_types(sinks.dtype, torch.float32))
    for (here, _), log_sum in zip(spans, log_sums, strict=True):
        delta = (grad[here] * out[here]).to(total.dtype).sum(-1).T  # [Q, n]
        total -= ((sinks.to(total.dtype)[:, None] - log_sum[0].to(total.dtype)).exp() * delta).sum(-1)
    return total.to(sinks.dtype)
