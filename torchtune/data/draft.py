"""Samples before they are tokens: text, and the regions of it that the model is to say."""

from __future__ import annotations

from dataclasses import dataclass, field

from torchtune.data.tracked import Tracked


@dataclass(frozen=True)
class Turn:
    """A region of a text that the model is to say: characters `start` to `end`, the end of turn included."""

    message: int
    start: int
    end: int


@dataclass
class Draft:
    """A sample as text.

    Attributes:
        text: the whole of it.
        turns: what of it is trained, in order.
        is_chat: a template wrote it, special tokens and all; else BOS and EOS are the tokenizer's to add.
    """

    text: Tracked
    turns: list[Turn]
    is_chat: bool = True


@dataclass
class Drafts:
    """What became of one row.

    Attributes:
        drafts: its samples, in the order of their turns.
        notes: what was found in it that the user should hear of, once.
    """

    drafts: list[Draft]
    notes: set[str] = field(default_factory=set)
