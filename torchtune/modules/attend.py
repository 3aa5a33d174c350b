"""Attention within documents: one operator over their boundaries.

Where ranks share the tokens, each has its own queries, and the keys and values of all are gathered first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune.distributed.collectives import gather
from torchtune.modules.cpu_attention import attend_on_cpu
from torchtune.modules.documents import Documents, Rows
from torchtune.modules.kv_cache import LayerCache
from torchtune.modules.tree_attention import attend_tree


@dataclass(frozen=True)
class Scores:
    """How attention scores are made, and which of them count.

    Attributes:
        scale: what the products of queries and keys are multiplied by.
        window: how many tokens back, itself included, a token sees; None means all.
        chunk: a token sees only its own stretch of so many tokens of its document (Llama 4); None means all.
        softcap: scores are held within it by softcap * tanh(scores / softcap) (Gemma 2, arXiv:2408.00118).
    """

    scale: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    scores: Scores,
    *,
    sinks: Tensor | None = None,
    cache: LayerCache | None = None,
) -> Tensor:
    """Causal attention of each token over its own document.

    Letters: T packed tokens, Q query heads, K key/value heads (Q a multiple of K), H head_dim.

    Args:
        q: [T, Q, H]. k, v: [T, K, H].
        sinks: [Q], a score a head that takes part in the softmax and has no value (gpt-oss, arXiv:2309.17453).
        cache: keys and values that came before; each document continues what it has there, and it takes in k and v.
    Returns:
        [T, Q, H].
    """
    if cache is not None:
        if documents.max_length == 1 and len(documents.lengths) == documents.num_tokens:
            return _attend_step(q, k, v, documents, scores, sinks, cache)
        seen = [cache.extend(index, k[start:end], v[start:end]) for index, (start, end) in enumerate(documents.bounds)]
        if not cache.is_new:
            bounds = documents.bounds
            return torch.cat(
                [
                    _attend_one(q[s:e], keys, values, scores, sinks)
                    for (s, e), (keys, values) in zip(bounds, seen, strict=True)
                ]
            )
    if isinstance(documents, Rows):
        return _attend_rows(q, k, v, documents, scores, sinks)
    is_plain = scores.chunk is None and scores.softcap is None and sinks is None and documents.split is None
    if is_plain and q.device.type == "cuda":
        return _attend_varlen(q, k, v, documents, documents, scores)
    return _by_length(q, k, v, documents, scores, sinks)


def _attend_by_length(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, scores: Scores, sinks: Tensor | None
) -> Tensor:
    """`attend` where the host must know the lengths."""
    if _is_tree(q, k, v, documents, scores, sinks):
        return attend_tree(q, k, v, documents, scores.scale)
    if scores.chunk is not None:
        documents = documents.chunked(scores.chunk)
    keys = documents  # the tokens of each document are the last of its keys
    if documents.split is not None:
        keys, places = documents.seen(scores.window)
        both = gather(torch.cat((k, v), dim=1), documents.split.axis)  # [size T, 2 K, H], in one collective
        # What two stretches of a document see is there twice, so that each finds its keys in one piece.
        k, v = both.index_select(0, places).chunk(2, dim=1)
    if scores.softcap is not None or (sinks is not None and q.device.type != "cpu"):
        parts = [
            _attend_one(q[start:end], k[first:last], v[first:last], scores, sinks)
            for (start, end), (first, last) in zip(documents.bounds, keys.bounds, strict=True)
        ]
        return torch.cat(parts)
    if q.device.type == "cuda":
        return _attend_varlen(q, k, v, documents, keys, scores)
    return attend_on_cpu(q, k, v, documents, keys, scores.scale, scores.window, sinks)


def _is_tree(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scores: Scores, sinks: Tensor | None) -> bool:
    """Whether nothing but plain attention to all that came before is asked for, on the CPU and without gradients."""
    if q.device.type != "cpu" or scores.softcap is not None or sinks is not None:
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return False
    if documents.split is not None and documents.split.axis.size > 1:
        return False
    reaches = [reach for reach in (scores.window, scores.chunk) if reach is not None]
    return not reaches or max(documents.reached, default=0) <= min(reaches)


_by_length: Callable[..., Tensor] = _attend_by_length


def hide_from_compiler() -> None:
    """Keep torch.compile out of what would be compiled anew for other lengths.

    Not at import, where loading dynamo would cost a second.
    """
    global _by_length
    _by_length = torch.compiler.disable(_attend_by_length)


def _attend_one(q: Tensor, k: Tensor, v: Tensor, scores: Scores, sinks: Tensor | None) -> Tensor:
    """One document: q [n, Q, H] are the last n of the m tokens that k and v, [m, K, H], hold."""
    num_new, num_all = q.shape[0], k.shape[0]
    if scores.softcap is not None or sinks is not None:
        return _attend_by_products(q, k, v, _visible(num_new, num_all, scores, q.device), scores, sinks)
    reach = min(scores.window or num_all, scores.chunk or num_all)
    mask = _visible(num_new, num_all, scores, q.device) if num_all > reach or 1 < num_new < num_all else None
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None and num_new > 1,
        scale=scores.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scores: Scores, sinks: Tensor | None) -> Tensor:
    """All documents at once, by operators that are the same for any number and length of them."""
    q, k, v = (x.unflatten(0, rows.shape) for x in (q, k, v))  # [B, S, heads, H]
    length = q.shape[1]
    is_causal = scores.window is None and scores.chunk is None  # and nothing else
    mask = None if is_causal else _visible(length, length, scores, q.device)
    if scores.softcap is not None or sinks is not None:
        mask = _visible(length, length, scores, q.device)
        return _attend_by_products(q, k, v, mask, scores, sinks).flatten(0, 1)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        scale=scores.scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2).flatten(0, 1)


def _attend_step(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, scores: Scores, sinks: Tensor | None, cache: LayerCache
) -> Tensor:
    """A token of each document, all documents at once: q [B, Q, H], k and v [B, K, H] -> [B, Q, H].

    The query heads that share a key head stand where the kernel has several queries of one head, so that keys are
    read once and not repeated for each.
    """
    keys, values = cache.append(k, v, documents.positions)  # [B, K, M, H]
    first, mask = _seen_in_step(documents, keys.shape[2], scores, q.dtype)
    if first:
        keys, values = keys[:, :, first:], values[:, :, first:]
    grouped = q.unflatten(1, (k.shape[1], -1))  # [B, K, G, H]
    if scores.softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scores.scale)
        return out.flatten(1, 2)
    wide = torch.promote_types(q.dtype, torch.float32)
    products = (grouped @ keys.transpose(2, 3)).to(wide) * scores.scale  # [B, K, G, M]
    if scores.softcap is not None:
        products = scores.softcap * torch.tanh(products / scores.softcap)
    if mask is not None:
        products = products + mask
    if sinks is not None:
        of_head = sinks.to(wide).view(1, *grouped.shape[1:3], 1).expand(len(q), -1, -1, -1)
        products = torch.cat((products, of_head), dim=-1)
    weights = products.softmax(-1)[..., : keys.shape[2]]
    return (weights.to(q.dtype) @ values).flatten(1, 2)


def _seen_in_step(documents: Documents, num_keys: int, scores: Scores, dtype: torch.dtype) -> tuple[int, Tensor | None]:
    """The first key that any document's token sees, and what hides others from some: [B, 1, 1, M - first] or nothing.

    Made once a step for all layers with the same window.
    """
    made: dict[tuple[int | None, int | None], tuple[int, Tensor | None]] = documents.__dict__.setdefault(
        "_seen_in_step", {}
    )
    kind = scores.window, scores.chunk
    if kind not in made:
        positions = documents.positions.to("cpu")[:, None]
        begin = torch.zeros_like(positions)
        if scores.window is not None:
            begin = (positions - scores.window + 1).clamp(min=0)
        if scores.chunk is not None:
            begin = torch.maximum(begin, positions - positions % scores.chunk)
        first = int(begin.min())
        place = torch.arange(first, num_keys)
        hidden = (place < begin) | (place > positions)  # [B, M - first]
        mask = None
        if hidden.any():
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))[:, None, None]
            mask = mask.to(documents.positions.device)
        made[kind] = first, mask
    return made[kind]


def _visible(num_new: int, num_all: int, scores: Scores, device: torch.device) -> Tensor:
    """[n, m], which of a document's m tokens each of its last n sees."""
    position = torch.arange(num_all - num_new, num_all, device=device)[:, None]
    other = torch.arange(num_all, device=device)[None, :]
    visible = other <= position
    if scores.window is not None:
        visible &= other > position - scores.window
    if scores.chunk is not None:
        visible &= other // scores.chunk == position // scores.chunk
    return visible


def _attend_by_products(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scores: Scores, sinks: Tensor | None
) -> Tensor:
    """Plain products, for scores that no fused kernel makes; any dims may stand before those of `_attend_one`."""
    group = q.shape[-2] // k.shape[-2]
    wide = torch.promote_types(q.dtype, torch.float32)
    products = torch.einsum("...nkgh,...mkh->...kgnm", q.unflatten(-2, (-1, group)), k).to(wide) * scores.scale
    if scores.softcap is not None:
        products = scores.softcap * torch.tanh(products / scores.softcap)
    products = products.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        of_head = sinks.to(wide).view(-1, group, 1, 1).expand(*products.shape[:-1], 1)  # [K, G, n, 1]
        products = torch.cat((products, of_head), dim=-1)
    weights = products.softmax(-1)[..., : k.shape[-3]]
    return torch.einsum("...kgnm,...mkh->...nkgh", weights.to(q.dtype), v).flatten(-3, -2)


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, documents: Documents, keys: Documents, scores: Scores) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    reach = (-1, 0) if scores.window is None else (scores.window - 1, 0)
    # Fewer queries than keys are taken to be the last ones (the kernel aligns its mask at the bottom right).
    out = varlen_attn(
        q,
        k,
        v,
        documents.cu_seqlens,
        keys.cu_seqlens,
        documents.max_length,
        keys.max_length,
        scale=scores.scale,
        window_size=reach,
    )
    assert isinstance(out, Tensor)
    return out
