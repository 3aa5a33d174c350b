"""Tokens that come one after the other, as text: what can be shown already, and where a stop text ends it."""

from __future__ import annotations

from collections.abc import Sequence

from torchtune.tokenizers.tokenizer import Tokenizer

CONTEXT = 8  # tokens of the prompt that are decoded along: some write a space only behind others
UNFINISHED = "\ufffd"  # what a character is shown as of which some bytes are still to come


class Detokenizer:
    """The text of an answer as it grows.

    What is decoded again for each token is the few before it.

    Args:
        tokenizer: the checkpoint's.
        prompt: the tokens before the answer.
        stops: texts that end it, and are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids = list(prompt[-CONTEXT:])
        self._begin, self._done = 0, len(self._ids)  # what is decoded, and as far as it is in the text
        self._given = 0  # tokens of the answer
        self._told = 0  # characters that were returned
        self.text = ""
        self.is_stopped = False

    def push(self, ids: Sequence[int]) -> str:
        """What can be shown of the text after an answer's tokens, of which the first ones were given before.

        A character of which bytes are to come waits, and so does what may be the beginning of a stop text.
        """
        self._ids += ids[self._given :]
        self._given = len(ids)
        before, now = (self._tokenizer.decode(self._ids[self._begin : end]) for end in (self._done, None))
        if not now.endswith(UNFINISHED) and len(now) > len(before):
            self._begin, self._done = self._done, len(self._ids)
            self._add(now[len(before) :])
        return self._tell(self._waiting())

    def end(self) -> str:
        """What is left at the answer's end."""
        before, now = (self._tokenizer.decode(self._ids[self._begin : end]) for end in (self._done, None))
        self._add(now[len(before) :])
        return self._tell(0)

    def _add(self, piece: str) -> None:
        if self.is_stopped:
            return
        searched = max(len(self.text) - max(map(len, self._stops), default=0), 0)
        self.text += piece
        places = [place for stop in self._stops if (place := self.text.find(stop, searched)) >= 0]
        if places:
            self.text, self.is_stopped = self.text[: min(places)], True

    def _waiting(self) -> int:
        """Characters at the end that begin a stop text."""
        if self.is_stopped:
            return 0
        longest = max(map(len, self._stops), default=1) - 1
        sizes = range(min(longest, len(self.text)), 0, -1)
        return next((size for size in sizes if any(stop.startswith(self.text[-size:]) for stop in self._stops)), 0)

    def _tell(self, waiting: int) -> str:
        begin, self._told = self._told, max(len(self.text) - waiting, self._told)
        return self.text[begin : self._told]
