"""Multi-head latent attention: keys and values of all heads come from one small vector a token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune.modules.attend import Scores, attend
from torchtune.modules.documents import Documents
from torchtune.modules.kv_cache import LayerCache
from torchtune.modules.linear import Linear
from torchtune.modules.naming import Block
from torchtune.modules.norms import RMSNorm
from torchtune.modules.rotary import RotaryAngles


class LatentAttention(Block):
    """Causal attention through low-rank projections, part of each head rotated.

    A head's queries and keys are its own P dims, without a position, and R rotated ones; the rotated part of
    the keys is shared by all heads. Values have V dims.

    Letters: T packed tokens, Q heads, D hidden_size, L kv_rank.
    Names are those of Hugging Face checkpoints. Source: DeepSeek-V2, 2024 (arXiv:2405.04434).

    Args:
        scores: scale, window and caps.
        query_rank: queries come from a vector of so many dims; None projects them at once.
        kv_rank: L.
        plain_dim, rotated_dim, value_dim: P, R and V.
        bias: the projections into the small vectors and the output's have biases.
        eps: of the norms of the small vectors.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        scores: Scores,
        query_rank: int | None,
        kv_rank: int,
        plain_dim: int,
        rotated_dim: int,
        value_dim: int,
        bias: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.scores = scores
        self.kv_rank, self.plain_dim, self.rotated_dim, self.value_dim = kv_rank, plain_dim, rotated_dim, value_dim
        query_size = num_heads * (plain_dim + rotated_dim)
        self.has_query_rank = query_rank is not None
        if query_rank is None:
            self.q_proj = Linear(hidden_size, query_size, bias=False)
        else:
            self.q_a_proj = Linear(hidden_size, query_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(query_rank, eps)
            self.q_b_proj = Linear(query_rank, query_size, bias=False)
        self.kv_a_proj_with_mqa = Linear(hidden_size, kv_rank + rotated_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(kv_rank, eps)
        self.kv_b_proj = Linear(kv_rank, num_heads * (plain_dim + value_dim), bias=False)
        self.o_proj = Linear(num_heads * value_dim, hidden_size, bias=bias)

    def forward(
        self,
        hidden_states: Tensor,
        rotary: RotaryAngles | None,
        documents: Documents,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """hidden_states [T, D] -> [T, D]."""
        q = self._queries(hidden_states).unflatten(-1, (-1, self.plain_dim + self.rotated_dim))  # [T, Q, P + R]
        latent, k_rotated = self.kv_a_proj_with_mqa(hidden_states).split([self.kv_rank, self.rotated_dim], dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (-1, self.plain_dim + self.value_dim))
        k_plain, v = kv.split([self.plain_dim, self.value_dim], dim=-1)  # [T, Q, P], [T, Q, V]
        q_plain, q_rotated = q.split([self.plain_dim, self.rotated_dim], dim=-1)
        k_rotated = k_rotated.unsqueeze(1)  # [T, 1, R]
        if rotary is not None:
            q_rotated, k_rotated = rotary.turn(q_rotated), rotary.turn(k_rotated)
        q = torch.cat((q_plain, q_rotated), dim=-1)
        k = torch.cat((k_plain, k_rotated.expand(-1, k_plain.shape[1], -1)), dim=-1)
        # What attends wants heads of one size; dims of zeros change neither a product nor a sum.
        size = max(q.shape[-1], self.value_dim)
        q, k, v = (F.pad(x, (0, size - x.shape[-1])) for x in (q, k, v))
        context = attend(q, k, v, documents, self.scores, cache=cache)[..., : self.value_dim]
        return self.o_proj(context.flatten(-2))

    def _queries(self, hidden_states: Tensor) -> Tensor:
        """[T, D] -> [T, Q (P + R)]."""
        if self.has_query_rank:
            return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        return self.q_proj(hidden_states)
