"""A decoder: embedding, layers, norm, and the head that is fused with the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchtune.modules.documents import Documents, Rows
from torchtune.modules.kv_cache import KVCache
from torchtune.modules.layer_step import LayerStep
from torchtune.modules.linear import Embedding, Linear
from torchtune.modules.losses import IGNORE_INDEX, LinearCrossEntropy
from torchtune.modules.moe import MoE, load_balancing_loss
from torchtune.modules.naming import Block
from torchtune.modules.products import FEW_ROWS, LaidOut, product
from torchtune.modules.rotary import RotaryAngles, RotaryEmbedding
from torchtune.modules.stored import as_in_model, as_stored, stored_pieces
from torchtune.modules.vocabulary import VocabularyShare

LossFunction = Callable[..., Tensor]
# What is made of some of the logits asked for, which of them, and these [n, V].
Reader = Callable[[slice, Tensor], Tensor]
READ_ROWS = 128  # logits that a reader is given at a time: few enough to stay in a cache


class Decoder(Block):
    """Token ids to hidden states.

    Args:
        rotary: of each layer; None where a layer knows no positions.
        norm: the last layer's output goes through it.
        embedding_scale: what embeddings are multiplied by, rounded to their type (Gemma, Granite).
        learned_positions: a learnt vector is added at each position, so many there are (GPT-2).
        max_positions: the model's context.

    Attributes:
        steps: what stands for each layer, if anything does, while few tokens go through with a cache.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        rotary: Sequence[RotaryEmbedding | None],
        norm: nn.Module,
        *,
        vocab_size: int,
        hidden_size: int,
        embedding_scale: float = 1.0,
        learned_positions: int | None = None,
        max_positions: int | None = None,
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(vocab_size, hidden_size)
        if learned_positions is not None:
            self.embed_positions = Embedding(learned_positions, hidden_size)
        self.has_learned_positions = learned_positions is not None
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.rotary = rotary
        self._changing_rotary = {each for each in rotary if each is not None and each.for_length is not None}
        self.embedding_scale = embedding_scale
        self.max_positions = max_positions
        self.steps: Sequence[LayerStep | None] = ()

    def forward(
        self,
        input_ids: Tensor,
        documents: Documents,
        *,
        dtype: torch.dtype | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """input_ids [T] -> [T, D] in `dtype`, or in the embedding's own."""
        self._check_lengths(documents, cache)
        hidden_states = self.embed_tokens(input_ids)
        if self.has_learned_positions:
            hidden_states = hidden_states + self.embed_positions(documents.positions)
        if dtype is not None:
            hidden_states = hidden_states.to(dtype)
        if self.embedding_scale != 1.0:
            # Rounded as the models were trained: sqrt(3072) is 55.5 in bfloat16.
            hidden_states = hidden_states * torch.tensor(self.embedding_scale, dtype=hidden_states.dtype)
        angles = self._angles(documents, hidden_states.dtype, cache)
        for index, layer in enumerate(self._layers(hidden_states, cache)):
            layer_cache = cache.layers[index] if cache is not None else None
            hidden_states = layer(hidden_states, angles[index], documents, layer_cache)
        if cache is not None:
            cache.advance(documents.lengths)
        return self.norm(hidden_states)

    def turns_alike(self, before: int, after: int) -> bool:
        """Whether a document of `before` tokens keeps the angles that they have when it grows to `after`.

        Where the frequencies change with the length (dynamic, longrope) it may not, and then a cache of its keys
        is of no more use.
        """
        return all(rotary.turns_alike(before, after) for rotary in self._changing_rotary)

    def _layers(self, hidden_states: Tensor, cache: KVCache | None) -> Iterable[Callable[..., Tensor]]:
        """The layers, or what stands for them."""
        if not self.steps or cache is None or len(hidden_states) > FEW_ROWS or torch.is_grad_enabled():
            return self.layers
        if hidden_states.dtype != self.embed_tokens.weight.dtype:
            return self.layers
        pairs: Iterable[tuple[nn.Module, LayerStep | None]] = zip(self.layers, self.steps, strict=True)
        return [layer if step is None or not step.is_same() else step for layer, step in pairs]

    def _check_lengths(self, documents: Documents, cache: KVCache | None) -> None:
        """Refuse what there are no positions for, and a cache whose keys were turned by other frequencies."""
        lengths = documents.whole_lengths
        seen = [0] * len(lengths) if cache is None else cache.lengths
        if cache is not None:
            if documents.split is not None:
                raise ValueError("tokens that are split over ranks can't be decoded with a cache; give whole documents")
            cache.check(lengths)
        for index, (before, new) in enumerate(zip(seen, lengths, strict=True)):
            if self.has_learned_positions and before + new > self.embed_positions.num_embeddings:
                raise ValueError(
                    f"document {index} has {before + new} tokens, and the model has learnt "
                    f"{self.embed_positions.num_embeddings} positions; it must be cut, by max_seq_len for instance"
                )
            if before and new and not self.turns_alike(before, before + new):
                raise ValueError(
                    f"document {index}: the {before} tokens in the cache were turned by other frequencies than those "
                    f"of a document of {before + new}; give the whole document with a new cache"
                )

    def _angles(self, documents: Documents, dtype: torch.dtype, cache: KVCache | None) -> list[RotaryAngles | None]:
        """Those of each layer; layers with the same frequencies share them."""
        reached: Sequence[int] = documents.reached
        if cache is not None:
            reached = [before + new for before, new in zip(cache.lengths, reached, strict=True)]
        made: dict[RotaryEmbedding, RotaryAngles] = {}
        for rotary in self.rotary:
            if rotary is not None and rotary not in made:
                made[rotary] = rotary.angles(documents.positions, dtype, lengths=documents.lengths, reached=reached)
        return [None if rotary is None else made[rotary] for rotary in self.rotary]


class CausalLM(Block):
    """A decoder and its head: logits, or the loss.

    Letters: T packed tokens, B documents of S tokens, V vocab_size.

    Args:
        logit_scale: what logits are multiplied by (Cohere, Granite).
        logit_softcap: logits are held within it by softcap * tanh(logits / softcap) (Gemma 2).
        head_bias: whether the head, where it is not tied, has a bias (Phi-2).
        router_loss: weight of the load-balancing loss of the experts, and experts a token; None leaves it out.
        prefix_choices: beginnings of names in the model, and what they are in a checkpoint, for each way in which
            the family's checkpoints are written; without any they are the model's own.
        carried: patterns of tensors that such checkpoints hold beside this model (a vision tower); they are
            written again as they were.

    Attributes:
        compute_dtype: the type that activations are computed in; None means the parameters'.
        stored_prefixes: the one of `prefix_choices` that is used.
        names_in_transformers: parts of names in this model, and what they are in transformers' memory, where that
            is not what its checkpoints say: adapters have those.
        peft_swaps_experts: PEFT reads the experts' stacks as [E, out, in] where they are [E, in, out].
        vocabulary: the rows that embedding and head have, where ranks share them.
        head_laid_out: a copy of the head's weight for few rows.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        tie_word_embeddings: bool,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        head_bias: bool = False,
        router_loss: tuple[float, int] | None = None,
        prefix_choices: Sequence[Mapping[str, str]] = (),
        carried: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.compute_dtype: torch.dtype | None = None
        if not tie_word_embeddings:
            vocab_size, hidden_size = model.embed_tokens.weight.shape
            self.lm_head = Linear(hidden_size, vocab_size, bias=head_bias)
        # A tied head owns no parameter and reads the embedding's.
        self.is_tied = tie_word_embeddings
        self.logit_scale, self.logit_softcap = logit_scale, logit_softcap
        self.router_loss = router_loss
        self.prefix_choices, self.carried = tuple(prefix_choices), tuple(carried)
        self.stored_prefixes: Mapping[str, str] = self.prefix_choices[0] if prefix_choices else {}
        self.names_in_transformers: Mapping[str, str] = {}
        self.peft_swaps_experts = False
        self.vocabulary: VocabularyShare | None = None
        self.head_laid_out: LaidOut | None = None
        self.register_state_dict_post_hook(_rename_to_stored)
        self.register_load_state_dict_pre_hook(_rename_from_stored)

    @property
    def head_weight(self) -> Tensor:
        """[V, D], the output projection."""
        return self.model.embed_tokens.weight if self.is_tied else self.lm_head.weight

    @property
    def head_bias(self) -> Tensor | None:
        """[V], what is added to the logits, or nothing."""
        return None if self.is_tied else self.lm_head.bias

    @property
    def vocabulary_parameters(self) -> list[str]:
        """Names of the parameters that have a row a token: the embedding's weight, and the head's if it owns any."""
        rows = [self.model.embed_tokens.weight] + ([] if self.is_tied else [self.lm_head.weight])
        rows += [] if self.head_bias is None else [self.head_bias]
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        return [names[id(parameter)] for parameter in rows]

    def empty_cache(self, num_documents: int = 1) -> KVCache:
        """A cache for decoding so many documents, that has seen nothing."""
        return KVCache.empty(len(self.model.layers), num_documents, max_positions=self.model.max_positions)

    def forward(
        self,
        input_ids: Tensor,
        documents: Documents | None = None,
        *,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
        trained: Tensor | None = None,
        loss: LossFunction | None = None,
        cache: KVCache | None = None,
        at: Tensor | None = None,
        read: Reader | None = None,
    ) -> Tensor:
        """Logits, or with `labels` the loss summed over trained tokens.

        Args:
            input_ids: [T] with `documents`, or [B, S], which is B documents of S tokens.
            positions: like input_ids, instead of `documents`: one begins with each row, and where a position is not
                the next.
            labels: like input_ids, the token that each position must predict; -100 where none is trained.
            trained: [N], the places in the flat labels that are not -100, where they are known already:
                finding them makes the host wait for the device.
            loss: (hidden [N, D], head weight [V, D], targets [N]) -> scalar sum; by default cross-entropy. A
                model whose logits are capped also passes `softcap`, one whose head has a bias `bias`, one whose
                head has a low-rank update `low_rank`: u [N, r] and b [V, r], where u b^T is added to the logits,
                one whose vocabulary is shared among ranks `vocabulary`.
            cache: keys and values of what came before.
            at: [N], the places on the flat token axis whose logits are wanted; by default all.
            read: (rows, logits [n, V]) -> tensor, called for the logits piece by piece; these are never whole in memory.
        Returns:
            Logits [T, V], [B, S, V] or [N, V], or what `read` returned, one after the other; with `labels` a float32
            scalar.
        Raises:
            ValueError: labels of another shape, or tokens for which there is no position.
        """
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(f"labels {tuple(labels.shape)} must have the shape of input_ids {tuple(input_ids.shape)}")
        if documents is None:
            documents = self._documents(input_ids, positions, cache)
        keeps = labels is not None and self.router_loss is not None
        if keeps:
            self._keep_router_logits(True)
        hidden = self.model(input_ids.reshape(-1), documents, dtype=self.compute_dtype, cache=cache)
        if keeps:  # off again: a layer that the backward pass computes once more must keep nothing of it
            self._keep_router_logits(False)
        if self.logit_scale != 1.0:
            hidden = hidden * self.logit_scale  # the same as scaled logits, and small
        if labels is None:
            shape = input_ids.shape
            if at is not None:
                hidden, shape = hidden[at], at.shape
            if read is None:
                return self._logits(hidden).view(*shape, -1)
            pieces = [slice(start, start + READ_ROWS) for start in range(0, len(hidden), READ_ROWS)]
            return torch.cat([read(rows, self._logits(hidden[rows])) for rows in pieces])
        labels = labels.reshape(-1)
        if trained is None:
            trained = (labels != IGNORE_INDEX).nonzero().squeeze(-1)  # [N]
        # With no trained token the loss is a zero that still leads to every parameter: a rank without
        # work takes part in the others' collectives.
        hidden = hidden[trained]
        options = {
            "softcap": self.logit_softcap,
            "bias": self.head_bias,
            "low_rank": self._head_update(hidden),
            "vocabulary": self.vocabulary,
        }
        given = {name: option for name, option in options.items() if option is not None}
        total = (loss or LinearCrossEntropy())(hidden, self.head_weight, labels[trained], **given)
        return total if self.router_loss is None else total + self._router_loss(documents) * len(trained)

    def _logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, D] -> [N, V]."""
        bias = None if self.head_bias is None else self.head_bias.to(hidden.dtype)
        logits = product(hidden, self.head_weight.to(hidden.dtype), bias, self.head_laid_out)
        if (update := self._head_update(hidden)) is not None:
            logits = logits + update[0] @ update[1].T
        if self.vocabulary is not None:
            logits = self.vocabulary.whole(logits)
        return logits if self.logit_softcap is None else softcapped(logits, self.logit_softcap)

    def _head_update(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """hidden [N, D] -> u [N, r] and b [V, r], whose product is added to the logits, where the head has an update."""
        low_rank = None if self.is_tied else getattr(self.lm_head, "low_rank", None)
        return None if low_rank is None else low_rank(hidden)

    def _documents(self, input_ids: Tensor, positions: Tensor | None, cache: KVCache | None) -> Documents:
        if positions is not None:
            return Documents.from_positions(positions)
        if torch.compiler.is_exporting():
            return Rows.of(input_ids)
        num_rows, num_tokens = input_ids.shape if input_ids.dim() == 2 else (1, len(input_ids))
        starts = cache.lengths if cache else None
        return Documents.from_lengths([num_tokens] * num_rows, starts=starts, device=input_ids.device)

    def _router_loss(self, documents: Documents) -> Tensor:
        """The load-balancing loss of the last forward, weighted; it counts once a trained token, and no dummies."""
        assert self.router_loss is not None
        weight, top_k = self.router_loss
        logits = [moe.router_logits for moe in self._mixtures() if moe.router_logits is not None]
        kept = [of_layer[: documents.num_real] for of_layer in logits]
        for moe in self._mixtures():
            moe.router_logits = None
        axis = None if documents.split is None else documents.split.axis
        return weight * load_balancing_loss(kept, top_k=top_k, axis=axis)

    def _keep_router_logits(self, keep: bool) -> None:
        for moe in self._mixtures():
            moe.keep_router_logits = keep

    def _mixtures(self) -> Iterator[MoE]:
        return (module for module in self.modules() if isinstance(module, MoE))


def softcapped(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap)."""
    return softcap * torch.tanh(logits / softcap)


def _rename_to_stored(model: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    """`state_dict()` has the checkpoint's names, whatever the layout in memory."""
    if all(len(pieces) == 1 and pieces[0].name == name for name, pieces in stored_pieces(model).items()):
        return
    own = {name: state.pop(name) for name in list(state) if name.startswith(prefix)}
    state.update(as_stored(model, own, prefix))


def _rename_from_stored(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """`load_state_dict` takes what `state_dict` gives."""
    own = {name: state.pop(name) for name in list(state) if name.startswith(prefix)}
    state.update(as_in_model(model, own, prefix))
