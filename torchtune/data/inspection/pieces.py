"""Token ids as the text that each stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from torchtune.tokenizers.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what decoding writes for a part of a character
_CONTEXT = 8  # tokens before one that decide how it is written


@dataclass(frozen=True)
class Piece:
    """The fewest tokens that make whole characters, mostly one: `ids[start:end]`."""

    start: int
    end: int
    text: str


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Piece]:
    """The text of token ids, piece by piece; joined, it is the text of the whole."""
    found: list[Piece] = []
    start = 0
    for end in range(1, len(ids) + 1):
        context = max(start - _CONTEXT, 0)
        # A context of its own: decoding treats the first token of a text otherwise than later ones.
        before = decode(tokenizer, ids[context:start])
        text = decode(tokenizer, ids[context:end])
        if text.endswith(UNFINISHED) and end < len(ids) and end - start < _CONTEXT:
            continue
        found.append(Piece(start, end, text[len(before) :]))
        start = end
    return found


def trained_spans(tokenizer: Tokenizer, ids: Sequence[int], trained: np.ndarray) -> list[str]:
    """The text of each run of trained tokens."""
    spans = []
    for is_trained, places in groupby(range(len(ids)), key=lambda place: bool(trained[place])):
        if is_trained:
            run = list(places)
            before = decode(tokenizer, ids[max(run[0] - _CONTEXT, 0) : run[0]])
            spans.append(decode(tokenizer, ids[max(run[0] - _CONTEXT, 0) : run[-1] + 1])[len(before) :])
    return spans


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text with its special tokens."""
    return tokenizer.decode(list(ids), skip_special_tokens=False)
