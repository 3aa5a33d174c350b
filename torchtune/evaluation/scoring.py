"""How likely continuations are to a model: many at once, common beginnings computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune.evaluation.prefix_tree import prefix_tree
from torchtune.generation.beginnings import num_shared
from torchtune.modules.decoder import CausalLM

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Score:
    """Of one continuation.

    Attributes:
        logprob: the sum of its tokens' log-probabilities, in nats.
        is_greedy: whether each of them is the most likely one.
    """

    logprob: float
    is_greedy: bool


@torch.no_grad()
def score(
    model: CausalLM, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[int, Score]]:
    """The scores of pairs of a context and its continuation, each with its place, as they are computed.

    Args:
        pairs: tokens; neither is empty.
        batch_tokens: tokens of texts that share nothing in a forward, as many whole texts as fit.
    Raises:
        ValueError: a pair with more tokens than the model has positions.
    """
    device = model.model.embed_tokens.weight.device
    # What the last token of a continuation leads to is not asked.
    texts = [[*context, *continuation][:-1] for context, continuation in pairs]
    was_training = model.training
    model.eval()
    try:
        for places in _batches(texts, batch_tokens):
            yield from zip(
                places, _scored(model, [pairs[p] for p in places], [texts[p] for p in places], device), strict=True
            )
    finally:
        model.train(was_training)


def _scored(
    model: CausalLM,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    texts: Sequence[Sequence[int]],
    device: torch.device,
) -> Iterator[Score]:
    # The same text is there several times where continuations have one token.
    distinct = {tuple(text): None for text in texts}
    tree = prefix_tree(list(distinct), alike=model.model.turns_alike)
    lies = dict(zip(distinct, tree.places, strict=True))
    wanted = [lies[tuple(text)][len(context) - 1 :] for (context, _), text in zip(pairs, texts, strict=True)]
    at, rows = torch.cat(wanted).unique(return_inverse=True)
    tokens = torch.tensor([token for _, continuation in pairs for token in continuation])
    reader = _Reader(rows, tokens)
    read = model(tree.input_ids.to(device), tree.documents.to(device), at=at.to(device), read=reader)
    found = torch.empty(len(tokens), 2, dtype=torch.float64)
    found[reader.order] = read.double().cpu()
    for part in found.split([len(continuation) for _, continuation in pairs]):
        yield Score(part[:, 0].sum().item(), bool(part[:, 1].all()))


class _Reader:
    """Takes tokens' log-probabilities from logits, [tokens, 2]: these, and whether the token is the most likely one.

    Args:
        rows: of each token, the row of the logits that leads to it.
    Attributes:
        order: of the tokens, as they are returned.
    """

    def __init__(self, rows: Tensor, tokens: Tensor) -> None:
        self.order = rows.argsort(stable=True)
        self._rows, self._tokens = rows[self.order], tokens[self.order]

    def __call__(self, rows: slice, logits: Tensor) -> Tensor:
        first, last = torch.searchsorted(self._rows, torch.tensor([rows.start, rows.stop])).tolist()
        here = (self._rows[first:last] - rows.start).to(logits.device)
        tokens = self._tokens[first:last].to(logits.device)
        # As argmax, and on the CPU two to four times as fast.
        greedy = logits.max(dim=-1).indices[here] == tokens
        wide = torch.promote_types(logits.dtype, torch.float32)
        # One kernel over each row; a logsumexp goes over all of them five times.
        logprobs = F.log_softmax(logits, dim=-1, dtype=wide)[here, tokens]
        return torch.stack((logprobs, greedy.to(wide)), dim=1)


def _batches(texts: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Places of texts that go together: those that begin alike lie side by side."""
    order = sorted(range(len(texts)), key=lambda place: list(texts[place]))
    batch: list[int] = []
    total = 0
    before: Sequence[int] = ()
    for place in order:
        text = texts[place]
        new = len(text) - num_shared(before, text)
        if batch and total + new > batch_tokens:
            yield batch
            batch, total, new = [], 0, len(text)
        batch.append(place)
        total += new
        before = text
    if batch:
        yield batch
