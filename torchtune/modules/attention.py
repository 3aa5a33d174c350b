"""The attention block: projections, norms of queries and keys, rotation, and what attends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from torchtune.modules.attend import Scores, attend
from torchtune.modules.documents import Documents
from torchtune.modules.kv_cache import LayerCache
from torchtune.modules.linear import Linear, linear_group
from torchtune.modules.naming import Block
from torchtune.modules.rotary import RotaryAngles


class Attention(Block):
    """Causal grouped-query attention over packed documents.

    Letters: T packed tokens, Q query heads, K key/value heads (Q a multiple of K), H head_dim, D hidden_size.
    Names are those of Hugging Face checkpoints. Source: Ainslie et al., 2023 (arXiv:2305.13245).

    Args:
        scores: scale, window and caps; by default 1 / sqrt(H), and all is seen.
        qkv_bias, output_bias: whether the projections have biases.
        fused: queries, keys and values come from one matrix, `qkv_proj`: its rows are all queries, all keys, all
            values ("whole"), or for each head its query, key and value ("by_head").
        linear: the kind of layer; GPT-2 has its own.
        q_norm, k_norm: norms of queries and keys.
        norm_at: where they are taken: of each head [T, Q, H], before ("head") or after ("rotated") the rotation,
            or of all heads as one [T, Q H] ("flat").
        clip: queries, keys and values are held within it, after a flat norm and before the rotation (OLMoE).
        query_scale: positions [T] to what the queries at them are multiplied by, in float32.
        has_sinks: a learnt score a head, that takes part in the softmax and has no value.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scores: Scores | None = None,
        qkv_bias: bool = False,
        output_bias: bool = False,
        fused: Literal["whole", "by_head"] | None = None,
        linear: type[nn.Module] = Linear,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        norm_at: Literal["head", "flat", "rotated"] = "head",
        clip: float | None = None,
        query_scale: Callable[[Tensor], Tensor] | None = None,
        has_sinks: bool = False,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.heads_per_kv_head = num_heads // num_kv_heads
        self.scores = scores or Scores(head_dim**-0.5)
        self.fused = fused
        query_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
        if fused is not None:
            self.qkv_proj = linear(hidden_size, query_size + 2 * kv_size, bias=qkv_bias)
        else:
            self.q_proj = linear(hidden_size, query_size, bias=qkv_bias)
            self.k_proj = linear(hidden_size, kv_size, bias=qkv_bias)
            self.v_proj = linear(hidden_size, kv_size, bias=qkv_bias)
        self.o_proj = linear(query_size, hidden_size, bias=output_bias)
        if q_norm is not None and k_norm is not None:
            self.q_norm, self.k_norm = q_norm, k_norm
        self.norm_at = norm_at if q_norm is not None else None
        self.clip = clip
        self.query_scale = query_scale
        self.sinks = nn.Parameter(torch.zeros(num_heads)) if has_sinks else None

    def forward(
        self,
        hidden_states: Tensor,
        rotary: RotaryAngles | None,
        documents: Documents,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """hidden_states [T, D] -> [T, D]; without `rotary` positions are left to the mask."""
        q, k, v = self._project(hidden_states)
        if self.clip is not None:
            q, k, v = (x.clamp(-self.clip, self.clip) for x in (q, k, v))
        if self.norm_at == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotary.turn_both(q, k)
        if self.norm_at == "rotated":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.query_scale is not None:
            q = (q * self.query_scale(documents.positions)[:, None, None]).to(q.dtype)
        context = attend(q, k, v, documents, self.scores, sinks=self.sinks, cache=cache)
        return self.o_proj(context.flatten(-2))

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, D] -> q [T, Q, H], k and v [T, K, H]."""
        # Head counts are read off the projections, so a tensor-parallel shard needs no edit here.
        if self.fused is None:
            q, k, v = linear_group([self.q_proj, self.k_proj, self.v_proj], hidden_states)
            if self.norm_at == "flat":
                q, k = self.q_norm(q), self.k_norm(k)
            size = (-1, self.head_dim)
            return q.unflatten(-1, size), k.unflatten(-1, size), v.unflatten(-1, size)
        heads = self.qkv_proj(hidden_states).unflatten(-1, (-1, self.head_dim))  # [T, Q + 2 K, H]
        if self.fused == "by_head":
            q, k, v = heads.unflatten(1, (-1, 3)).unbind(2)
            return q, k, v
        num_kv_heads = heads.shape[1] // (self.heads_per_kv_head + 2)
        q, k, v = heads.split([num_kv_heads * self.heads_per_kv_head, num_kv_heads, num_kv_heads], dim=1)
        return q, k, v
