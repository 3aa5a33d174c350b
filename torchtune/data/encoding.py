"""Drafts to samples: token ids, and which of them are trained.

A prompt is encoded as inference encodes it, alone. Where encoding the whole text gives other tokens around
the place where the model begins to speak (a token that straddles it, or white space that is cut otherwise),
that turn becomes a sample of its own: the prompt's tokens, then those of the rest.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from torchtune.data.draft import Draft, Turn
from torchtune.data.sample import Sample
from torchtune.data.tracked import GENERATION, Label, Span, Tracked, plain
from torchtune.errors import DataError
from torchtune.tokenizers.tokenizer import Tokenizer

_CACHED_CHARS = 200


@dataclass
class Tokens:
    """Ids, and the characters that each stands for."""

    ids: list[int]
    starts: list[int]
    ends: list[int]

    def cut(self, end: int) -> Tokens:
        """The first `end` tokens."""
        return Tokens(self.ids[:end], self.starts[:end], self.ends[:end])

    def add(self, other: Tokens, offset: int) -> None:
        """Append tokens of a text that begins at character `offset`."""
        self.ids += other.ids
        self.starts += [start + offset for start in other.starts]
        self.ends += [end + offset for end in other.ends]


class Encoder:
    """Encodes drafts.

    Args:
        tokenizer: the checkpoint's.
        special_tokens_in_content: what is done with special tokens' texts in messages: `error`, `split`
            (encode them as plain text) or `allow`.
    """

    def __init__(self, tokenizer: Tokenizer, special_tokens_in_content: str) -> None:
        self.tokenizer = tokenizer
        self.special_tokens_in_content = special_tokens_in_content
        self._special = frozenset(tokenizer.special_tokens.values())
        self._added = frozenset(tokenizer.added_tokens.values()) | self._special
        bos = tokenizer.bos_id
        adds_bos = tokenizer.encode_plain_text("a")[:1] == [bos] != tokenizer.encode("a").ids[:1]
        self._bos = bos if adds_bos else None
        # Some tokenizers write a space before a text's first word, which is not there in the middle of one.
        anchor = tokenizer.eos_token or tokenizer.bos_token or ""
        self._anchor = "" if tokenizer.encode("a").ids == tokenizer.encode(f"{anchor}a").ids[1:] else anchor
        self._prompt_tails: dict[str, list[int]] = {}

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokens of many texts; what `samples_of` wants."""
        encodings = self.tokenizer.encode_batch([plain(text) for text in texts])
        return [_tokens(encoding.ids, encoding.offsets) for encoding in encodings]

    def samples_of(self, drafts: Sequence[Draft], tokens: Sequence[Tokens], *, source: str, row: int) -> list[Sample]:
        """The samples of drafts that were encoded already.

        Raises:
            DataError: a message holds a special token's text, and that is not allowed.
        """
        samples = []
        for draft, encoded in zip(drafts, tokens, strict=True):
            encoded = self._without_forged(draft.text, encoded)
            for own, own_tokens in self._as_at_inference(draft, encoded):
                ids, trained = self._finish(own, own_tokens)
                samples.append(Sample(np.array(ids, np.int32), trained, source, row))
        return samples

    def prompt_ids(self, text: Tracked, *, is_chat: bool) -> list[int]:
        """The tokens of a prompt; a text that no template wrote gets BOS as the tokenizer adds it, once.

        Raises:
            DataError: a message holds a special token's text, and that is not allowed.
        """
        ids = self._without_forged(text, self._tokens(text)).ids
        return ids if is_chat or self._bos is None or ids[:1] == [self._bos] else [self._bos, *ids]

    def _tokens(self, text: Tracked) -> Tokens:
        return self.encode_batch([text])[0]

    def _as_at_inference(self, draft: Draft, tokens: Tokens) -> Iterator[tuple[Draft, Tokens]]:
        """The draft without the turns whose prompts are encoded otherwise alone, and those on their own."""
        apart: list[tuple[Draft, Tokens]] = []
        kept: list[Turn] = []
        for turn in draft.turns:
            prompt = self._prompt(draft.text, tokens, turn.start)
            if prompt is None:
                kept.append(turn)
                continue
            end = turn.end if len(draft.turns) > 1 else len(draft.text)
            rest = self._continuation(draft.text.cut(turn.start, end))
            prompt.add(rest, turn.start)
            apart.append((Draft(draft.text.cut(0, end), [turn], draft.is_chat), prompt))
        if kept:
            yield (draft if len(kept) == len(draft.turns) else Draft(draft.text, kept, draft.is_chat)), tokens
        yield from apart

    def _prompt(self, text: Tracked, tokens: Tokens, start: int) -> Tokens | None:
        """The tokens of the text up to `start` encoded alone, None if `tokens` begin with just these.

        Added tokens part a text into pieces that don't touch each other, so only what follows the last one
        before `start` has to be encoded again. It is mostly the same few words.
        """
        if start == 0:
            return None
        boundary = bisect_left(tokens.starts, start)
        piece = boundary
        while piece > 0:
            piece -= 1
            if tokens.ids[piece] in self._added and tokens.ends[piece] <= start:
                break
        begin = tokens.starts[piece] if piece else 0
        alone = self._tail_ids(text.cut(begin, start))
        if alone == tokens.ids[piece:boundary] and (boundary == 0 or tokens.ends[boundary - 1] <= start):
            return None
        prompt = tokens.cut(piece)
        # Where exactly in the prompt they lie doesn't matter: nothing of it is trained.
        prompt.add(Tokens(list(alone), [0] * len(alone), [0] * len(alone)), begin)
        return prompt

    def _tail_ids(self, text: Tracked) -> list[int]:
        if len(text) > _CACHED_CHARS or _said(text):
            return self._without_forged(text, self._tokens(text)).ids
        key = plain(text)
        if key not in self._prompt_tails:
            self._prompt_tails[key] = self._tokens(text).ids
        return self._prompt_tails[key]

    def _continuation(self, text: Tracked) -> Tokens:
        """Tokens of a text that something precedes."""
        size = len(self._anchor)
        anchored = self._anchor + text
        tokens = self._without_forged(anchored, self._tokens(anchored))
        first = bisect_left(tokens.starts, size)
        return Tokens(
            tokens.ids[first:],
            [start - size for start in tokens.starts[first:]],
            [end - size for end in tokens.ends[first:]],
        )

    def _without_forged(self, text: Tracked, tokens: Tokens) -> Tokens:
        """The tokens, with special ones in messages' words refused or encoded as plain text."""
        if self.special_tokens_in_content == "allow":
            return tokens
        forged = self._forged(text, tokens)
        if forged and self.special_tokens_in_content == "error":
            start, end, (message, name) = forged[0]
            whose = f"{name} of message {message + 1}" if message >= 0 else name
            raise DataError(
                f"{whose} holds the special token {text[start:end]!r}. If it is meant as text, "
                "dataset.special_tokens_in_content=split encodes it as plain text; if as the token, =allow"
            )
        cuts: set[int] = set()
        while forged:
            # Cut behind each one's first character: what is left of it is no token any more. Another one
            # can come to light by that, so look again.
            cuts.update(start + 1 for start, _, _ in forged)
            edges = [0, *sorted(cuts), len(text)]
            pieces = [text.cut(begin, end) for begin, end in pairwise(edges)]
            tokens = Tokens([], [], [])
            for begin, piece in zip(edges, self.encode_batch(pieces), strict=False):
                tokens.add(piece, begin)
            forged = self._forged(text, tokens)
        return tokens

    def _forged(self, text: Tracked, tokens: Tokens) -> list[tuple[int, int, Label]]:
        """Start, end and label of special tokens that are, wholly or partly, words of a message."""
        special = [place for place, token in enumerate(tokens.ids) if token in self._special]
        spans = _said(text)
        starts = [start for start, _, _ in spans]
        forged = []
        for place in special:
            start, end = tokens.starts[place], tokens.ends[place]
            written = plain(text[start:end])
            start += len(written) - len(written.lstrip())  # some tokens swallow the white space around them
            end -= len(written) - len(written.rstrip())
            before = bisect_left(starts, end) - 1
            if before >= 0 and spans[before][1] > start:
                forged.append((start, end, spans[before][2]))
        return forged

    def _finish(self, draft: Draft, tokens: Tokens) -> tuple[list[int], np.ndarray]:
        ids = tokens.ids
        trained = np.zeros(len(ids), np.bool_)
        for turn in draft.turns:
            trained[bisect_left(tokens.starts, turn.start) : bisect_left(tokens.starts, turn.end)] = True
        if not draft.is_chat:
            ids, trained = self._with_ends(ids, trained)
        trained[:1] = False
        return ids, trained

    def _with_ends(self, ids: list[int], trained: np.ndarray) -> tuple[list[int], np.ndarray]:
        """BOS as the tokenizer adds it, and EOS, each once."""
        if self._bos is not None and ids[:1] != [self._bos]:
            ids, trained = [self._bos, *ids], np.append(False, trained)
        eos = self.tokenizer.eos_id
        if eos is None:
            raise DataError("this tokenizer has no EOS token, and a row without a chat template ends in one")
        if ids[-1:] != [eos]:
            ids, trained = [*ids, eos], np.append(trained, True)
        return ids, trained


def _said(text: Tracked) -> list[Span]:
    """Spans of what a row says; its roles are not, since they are of a fixed list."""
    return [span for span in text.spans if span[2][1] != "role" and span[2] != GENERATION]


def _tokens(ids: list[int], offsets: list[tuple[int, int]]) -> Tokens:
    return Tokens(list(ids), [start for start, _ in offsets], [end for _, end in offsets])
