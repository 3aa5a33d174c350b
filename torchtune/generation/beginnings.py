"""What prompts begin with: read once, and gone on from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from torchtune.modules.decoder import CausalLM
from torchtune.modules.documents import Documents
from torchtune.modules.kv_cache import KVCache

MIN_SHARED = 32  # tokens that all prompts begin with, below which each is read whole


def num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def beginning_of(prompts: Sequence[Sequence[int]]) -> Sequence[int]:
    """The tokens that all of several prompts begin with, where they are much of each; otherwise none."""
    if len(prompts) < 2:
        return ()
    # Of sequences in their order, the first and the last have the least in common.
    first, last = min(prompts, key=list), max(prompts, key=list)
    length = num_shared(first, last)
    return first[:length] if length >= max(MIN_SHARED, max(map(len, prompts)) // 4) else ()


@dataclass
class Remembered:
    """What the model has read, for prompts that begin alike: the last prompt and answer of a chat, examples of a task.

    Attributes:
        ids: its tokens.
        cache: of one slot, their keys and values.
    """

    ids: list[int] = field(default_factory=list)
    cache: KVCache | None = None

    def num_shared(self, ids: Sequence[int]) -> int:
        """How many of the first of these tokens need not be read; the last is not among them, for it is gone on from."""
        return num_shared(self.ids, ids[:-1])


@torch.no_grad()
def read(model: CausalLM, ids: Sequence[int]) -> Remembered:
    """Read tokens."""
    cache, flat = model.empty_cache(1), torch.tensor(ids, device=model.model.embed_tokens.weight.device)
    model.model(flat, Documents.from_lengths([len(ids)], device=flat.device), dtype=model.compute_dtype, cache=cache)
    return Remembered(list(ids), cache)
