"""Attention within documents: one operator over their boundaries, and the block around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtune.modules.cpu_attention import attend_on_cpu
from torchtune.modules.documents import Documents
from torchtune.modules.kv_cache import LayerCache
from torchtune.modules.linear import Linear
from torchtune.modules.rotary import RotaryAngles


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of each token over its own document.

    Letters: T packed tokens, Q query heads, K key/value heads (Q a multiple of K), H head_dim.

    Args:
        q: [T, Q, H]. k, v: [T, K, H].
        scale: what the products are multiplied by.
        window: how many tokens back, itself included, a token sees; None means all.
        softcap: scores are held within it by softcap * tanh(scores / softcap) (Gemma 2, arXiv:2408.00118).
    Returns:
        [T, Q, H].
    """
    if softcap is not None:
        parts = zip(*(tensor.split(list(documents.lengths)) for tensor in (q, k, v)), strict=True)
        return torch.cat([_attend_one(*part, scale=scale, window=window, softcap=softcap) for part in parts])
    if q.device.type == "cuda":
        return _attend_varlen(q, k, v, documents, scale, window)
    return attend_on_cpu(q, k, v, documents, scale, window)


def attend_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    cache: LayerCache,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """As `attend`, where each document continues what `cache` has of it; `cache` takes in k and v."""
    parts = []
    for index, (start, end) in enumerate(documents.bounds):
        keys, values = cache.extend(index, k[start:end], v[start:end])
        parts.append(_attend_one(q[start:end], keys, values, scale=scale, window=window, softcap=softcap))
    return torch.cat(parts)


def _attend_one(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """One document: q [n, Q, H] are the last n of the m tokens that k and v, [m, K, H], hold."""
    num_new, num_all = q.shape[0], k.shape[0]
    mask = None
    if softcap is not None or (window is not None and num_all > window) or 1 < num_new < num_all:
        position = torch.arange(num_all - num_new, num_all, device=q.device)[:, None]
        other = torch.arange(num_all, device=q.device)[None, :]
        mask = other <= position
        if window is not None:
            mask &= other > position - window
    if softcap is not None:
        return _softcapped(q, k, v, mask, scale, softcap)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None and num_new > 1,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


def _softcapped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    assert mask is not None
    group = q.shape[1] // k.shape[1]
    queries = q.unflatten(1, (-1, group))  # [n, K, group, H]
    scores = torch.einsum("nkgh,mkh->kgnm", queries, k) * scale
    scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    return torch.einsum("kgnm,mkh->nkgh", weights.to(q.dtype), v).flatten(1, 2)


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    cu_seqlens, longest = documents.cu_seqlens, documents.max_length
    reach = (-1, 0) if window is None else (window - 1, 0)
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=reach)
    assert isinstance(out, Tensor)
    return out


class Attention(nn.Module):
    """Causal grouped-query attention over packed documents.

    Letters as in `attend`; D is hidden_size. Names and the half-rotated rotary layout are those of
    Hugging Face checkpoints. Source: Ainslie et al., 2023 (arXiv:2305.13245).

    Args:
        qkv_bias, output_bias: whether the projections have biases.
        q_norm, k_norm: norms over each query and key head (H), applied before the rotation.
        window: how many tokens back a token sees, itself included; None means all.
        softcap: as in `attend`.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qkv_bias: bool = False,
        output_bias: bool = False,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.window = window
        self.softcap = softcap
        self.scale = head_dim**-0.5
        self.q_proj = Linear(hidden_size, num_heads * head_dim, bias=qkv_bias)
        self.k_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, bias=output_bias)
        if q_norm is not None and k_norm is not None:
            self.q_norm, self.k_norm = q_norm, k_norm
        self.has_qk_norm = q_norm is not None

    def forward(
        self, hidden_states: Tensor, rotary: RotaryAngles, documents: Documents, cache: LayerCache | None = None
    ) -> Tensor:
        # Head counts are read off the projections, so a tensor-parallel shard needs no edit here.
        q = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim))  # [T, Q, H]
        k = self.k_proj(hidden_states).unflatten(-1, (-1, self.head_dim))  # [T, K, H]
        v = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim))  # [T, K, H]
        if self.has_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotary.turn(q), rotary.turn(k)
        if cache is None:
            context = attend(q, k, v, documents, scale=self.scale, window=self.window, softcap=self.softcap)
        else:
            context = attend_cached(
                q, k, v, documents, cache, scale=self.scale, window=self.window, softcap=self.softcap
            )
        return self.o_proj(context.flatten(-2))  # [T, D]
