"""Text to token ids and back: a thin face over the `tokenizers` library.

It is handed bytes and parsed config, whatever file these came from. Special tokens come from the text
alone: nothing is added that the text does not hold, except where `encode_plain_text` says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from torchtune.errors import CheckpointError
from torchtune.tokenizers.added_tokens import NAMED_TOKENS, text_of


@dataclass(frozen=True)
class Encoding:
    """Token ids and, for each, the span of characters of the text that it came from."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class Tokenizer:
    """Encodes and decodes; knows the special tokens.

    Attributes:
        special: names and texts of the special tokens, for templates: `{"bos_token": "<s>", ...}`.
    """

    def __init__(self, fast: FastTokenizer, config: Mapping[str, Any]) -> None:
        fast.no_truncation()
        fast.no_padding()
        self._fast = fast
        self.special: dict[str, str] = {}
        for name in NAMED_TOKENS:
            if content := text_of(config.get(name)):
                self.special[name] = content

    @classmethod
    def from_json(cls, tokenizer_json: bytes, tokenizer_config: Mapping[str, Any] | None = None) -> Tokenizer:
        """A tokenizer from the content of tokenizer.json and of tokenizer_config.json.

        Raises:
            CheckpointError: the content is no tokenizer.
        """
        try:
            fast = FastTokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # the library raises a bare Exception
            raise CheckpointError(f"tokenizer.json can't be read: {error}") from error
        return cls(fast, tokenizer_config or {})

    def encode(self, text: str) -> Encoding:
        """The ids of `text` with their character spans; special tokens written in it become their ids."""
        encoding = self._fast.encode(text, add_special_tokens=False)
        return Encoding(encoding.ids, encoding.offsets)

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """`encode` for many texts, on all cores."""
        encodings = self._fast.encode_batch(list(texts), add_special_tokens=False)
        return [Encoding(encoding.ids, encoding.offsets) for encoding in encodings]

    def encode_plain_text(self, text: str) -> list[int]:
        """The ids of a text as pre-training saw it: with BOS where this tokenizer adds one, exactly once; no EOS."""
        ids = self._fast.encode(text, add_special_tokens=False).ids
        if self.adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self._fast.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """The id of a token's text, if it is one."""
        return self._fast.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The text by which a token is written in the vocabulary."""
        return self._fast.id_to_token(token_id)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return max(self._fast.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def added_tokens(self) -> dict[str, int]:
        """Text and id of each token added to the vocabulary, special or not."""
        return {token.content: token_id for token_id, token in self._fast.get_added_tokens_decoder().items()}

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Text and id of each special token: those that decoding leaves out."""
        decoder = self._fast.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in decoder.items() if token.special}

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer's own post-processor puts BOS before a text."""
        return self.bos_id is not None and self._fast.encode("a", add_special_tokens=True).ids[:1] == [self.bos_id]

    @cached_property
    def adds_eos(self) -> bool:
        """Whether the tokenizer's own post-processor puts EOS after a text."""
        return self.eos_id is not None and self._fast.encode("a", add_special_tokens=True).ids[-1:] == [self.eos_id]

    @property
    def bos_token(self) -> str | None:
        """Text of the beginning-of-sequence token."""
        return self.special.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """Text of the end-of-sequence token."""
        return self.special.get("eos_token")

    @cached_property
    def bos_id(self) -> int | None:
        """Id of the beginning-of-sequence token."""
        return self._named_id("bos_token")

    @cached_property
    def eos_id(self) -> int | None:
        """Id of the end-of-sequence token."""
        return self._named_id("eos_token")

    @cached_property
    def pad_id(self) -> int | None:
        """Id of the padding token."""
        return self._named_id("pad_token")

    @property
    def sep_id(self) -> int | None:
        """Id of the separator token."""
        return self._named_id("sep_token")

    @property
    def mask_id(self) -> int | None:
        """Id of the mask token."""
        return self._named_id("mask_token")

    def to_json(self) -> str:
        """The content of a tokenizer.json."""
        return str(self._fast.to_str())

    def _named_id(self, name: str) -> int | None:
        token = self.special.get(name)
        return None if token is None else self._fast.token_to_id(token)

    # Worker processes get their tokenizer by pickling; the library's object is written as JSON.
    def __getstate__(self) -> dict[str, Any]:
        return {"json": self.to_json(), "special": self.special}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._fast = FastTokenizer.from_str(state["json"])
        self.special = state["special"]
