"""The checkpoint that a run starts from, as its params ask for it."""

from __future__ import annotations

from pathlib import Path

from torchtune.checkpoint.open import Checkpoint, open_checkpoint
from torchtune.checkpoint.vocabulary import grow_vocabulary
from torchtune.recipes.params import FinetuneParams


def open_base_checkpoint(source: str | Path, params: FinetuneParams, *, weights: bool = True) -> Checkpoint:
    """`source` with the tokenizer, the new tokens and the vocabulary size that the params ask for; no weight is read.

    Raises:
        CheckpointError, UnsupportedError: says which file is wrong and what to do.
    """
    checkpoint = open_checkpoint(source, tokenizer=params.tokenizer, weights=weights)
    if not params.new_tokens and params.pad_vocab_to_multiple_of is None:
        return checkpoint
    return grow_vocabulary(checkpoint, params.new_tokens, pad_to_multiple_of=params.pad_vocab_to_multiple_of)
