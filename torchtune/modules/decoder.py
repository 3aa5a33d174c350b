"""A decoder: embedding, layers, norm, and the head that is fused with the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtune.modules.attention import Attention
from torchtune.modules.documents import Documents
from torchtune.modules.kv_cache import KVCache, LayerCache
from torchtune.modules.linear import Embedding, Linear
from torchtune.modules.losses import IGNORE_INDEX, LinearCrossEntropy
from torchtune.modules.norms import RMSNorm
from torchtune.modules.rotary import RotaryAngles, RotaryEmbedding

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each on normed input and added to the stream."""

    def __init__(self, attention: Attention, mlp: nn.Module, *, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = RMSNorm(hidden_size, eps)
        self.post_attention_layernorm = RMSNorm(hidden_size, eps)

    def forward(
        self, hidden_states: Tensor, rotary: RotaryAngles, documents: Documents, cache: LayerCache | None = None
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(hidden_states), rotary, documents, cache)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Decoder(nn.Module):
    """Token ids to hidden states."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        rotary: RotaryEmbedding,
        *,
        vocab_size: int,
        hidden_size: int,
        eps: float,
        max_positions: int | None = None,
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(vocab_size, hidden_size)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(hidden_size, eps)
        self.rotary = rotary
        self.max_positions = max_positions

    def forward(
        self,
        input_ids: Tensor,
        documents: Documents,
        *,
        dtype: torch.dtype | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """input_ids [T] -> [T, D] in `dtype`, or in the embedding's own."""
        hidden_states = self.embed_tokens(input_ids)
        if dtype is not None:
            hidden_states = hidden_states.to(dtype)
        longest = documents.max_length
        if cache is not None:
            cache.check(documents.lengths)
            longest = max(seen + new for seen, new in zip(cache.lengths, documents.lengths, strict=True))
        rotary = self.rotary.angles(documents.positions, longest, hidden_states.dtype)
        for index, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, rotary, documents, cache.layers[index] if cache is not None else None)
        if cache is not None:
            cache.advance(documents.lengths)
        return self.norm(hidden_states)


class CausalLM(nn.Module):
    """A decoder and its head: logits, or the loss.

    Letters: T packed tokens, B documents of S tokens, V vocab_size.

    Attributes:
        compute_dtype: the type that activations are computed in; None means the parameters'.
    """

    def __init__(self, model: Decoder, *, tie_word_embeddings: bool) -> None:
        super().__init__()
        self.model = model
        self.compute_dtype: torch.dtype | None = None
        if not tie_word_embeddings:
            vocab_size, hidden_size = model.embed_tokens.weight.shape
            self.lm_head = Linear(hidden_size, vocab_size, bias=False)
        # A tied head owns no parameter and reads the embedding's.
        self.is_tied = tie_word_embeddings

    @property
    def head_weight(self) -> Tensor:
        """[V, D], the output projection."""
        return self.model.embed_tokens.weight if self.is_tied else self.lm_head.weight

    def forward(
        self,
        input_ids: Tensor,
        documents: Documents | None = None,
        *,
        labels: Tensor | None = None,
        trained: Tensor | None = None,
        loss: LossFunction | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits, or with `labels` the loss summed over trained tokens.

        Args:
            input_ids: [T] with `documents`, or [B, S], which is B documents of S tokens.
            labels: like input_ids, the token that each position must predict; -100 where none is trained.
            trained: [N], the places in the flat labels that are not -100, where they are known already:
                finding them makes the host wait for the device.
            loss: (hidden [N, D], head weight [V, D], targets [N]) -> scalar sum; by default cross-entropy.
            cache: keys and values of what came before.
        Returns:
            Logits [T, V] or [B, S, V]; with `labels` a float32 scalar.
        """
        batched = input_ids.dim() == 2
        if documents is None:
            if not batched:
                input_ids = input_ids[None]
            num_rows, num_tokens = input_ids.shape
            documents = Documents.from_lengths(
                [num_tokens] * num_rows, starts=cache.lengths if cache else None, device=input_ids.device
            )
        shape = input_ids.shape if batched else (documents.num_tokens,)
        hidden = self.model(input_ids.reshape(-1), documents, dtype=self.compute_dtype, cache=cache)
        if labels is None:
            return F.linear(hidden, self.head_weight.to(hidden.dtype)).view(*shape, -1)
        labels = labels.reshape(-1)
        if trained is None:
            trained = (labels != IGNORE_INDEX).nonzero().squeeze(-1)  # [N]
        # With no trained token the loss is a zero that still leads to every parameter: a rank without
        # work takes part in the others' collectives.
        return (loss or LinearCrossEntropy())(hidden[trained], self.head_weight, labels[trained])
