"""Text from a model, one token at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch

from torchtune.modules.decoder import CausalLM
from torchtune.modules.documents import Documents
from torchtune.modules.kv_cache import KVCache


@torch.no_grad()
def generate(
    model: CausalLM, prompt_ids: list[int], *, max_new_tokens: int, stop_ids: Collection[int] = ()
) -> Iterator[int]:
    """The most likely next tokens after a prompt, as they come; the stop token is not among them.

    Args:
        prompt_ids: the prompt's tokens, with whatever the template puts before an answer.
        max_new_tokens: at most so many are made.
        stop_ids: tokens that end the answer.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    cache = KVCache.for_model(model, num_documents=1)
    ids, start = torch.tensor(prompt_ids, device=device), 0
    try:
        for _ in range(max_new_tokens):
            documents = Documents.from_lengths([len(ids)], starts=[start], device=device)
            logits = model(ids, documents, cache=cache)
            start += len(ids)
            token = int(logits[-1].argmax())
            if token in stop_ids:
                return
            yield token
            ids = torch.tensor([token], device=device)
    finally:
        model.train(was_training)
