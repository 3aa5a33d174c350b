"""Text from a model, one token at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch

from torchtune.modules.decoder import CausalLM
from torchtune.modules.documents import Documents


@torch.no_grad()
def generate(
    model: CausalLM, prompt_ids: Sequence[int], *, max_new_tokens: int, stop_ids: Collection[int] = ()
) -> Iterator[int]:
    """The most likely next tokens after a prompt, as they come; the stop token is not among them.

    They are those of a forward over the whole text for each: where a text grows so long that other frequencies
    turn it (longrope, dynamic), what is cached of it is thrown away and the whole is read again.

    Args:
        prompt_ids: the prompt's tokens, with whatever the template puts before an answer.
        max_new_tokens: at most so many are made.
        stop_ids: tokens that end the answer.
    Raises:
        ValueError: prompt and answer need more positions than the model has.
    """
    limit = model.model.max_positions
    if limit is not None and len(prompt_ids) + max_new_tokens > limit:
        raise ValueError(
            f"{len(prompt_ids)} prompt tokens and {max_new_tokens} new ones are more than the model's {limit} positions"
        )
    was_training = model.training
    model.eval()
    device = model.model.embed_tokens.weight.device
    ids = list(prompt_ids)
    cache, seen = model.empty_cache(), 0
    try:
        for _ in range(max_new_tokens):
            if seen and not model.model.turns_alike(seen, len(ids)):
                cache, seen = model.empty_cache(), 0
            documents = Documents.from_lengths([len(ids) - seen], starts=[seen], device=device)
            logits = model(torch.tensor(ids[seen:], device=device), documents, cache=cache)
            seen = len(ids)
            token = int(logits[-1].argmax())
            if token in stop_ids:
                return
            yield token
            ids.append(token)
    finally:
        model.train(was_training)
