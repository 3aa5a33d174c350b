"""A tiktoken file (`tokenizer.model` of Llama 3, `*.tiktoken`) as a tokenizer of the `tokenizers` library.

Each line holds a token's bytes in base64 and its rank. How text is cut and which special tokens follow the ranks
stands in no such file; the published vocabularies are told by their number of ranks.
"""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from torchtune.errors import CheckpointError
from torchtune.tokenizers.merges import merges_in_order
from torchtune.tokenizers.splits import LAYOUTS, ByteLevelLayout, byte_alphabet, byte_level_tokenizer

logger = logging.getLogger(__name__)

NUM_LLAMA3_SPECIAL = 256


@dataclass(frozen=True)
class Vocabulary:
    """A published vocabulary.

    Attributes:
        layout: how text is cut.
        special: its special tokens by id.
        names: those that have a name, as tokenizer_config.json would say it.
        adds_bos: a text begins with BOS.
    """

    layout: ByteLevelLayout
    special: dict[int, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    adds_bos: bool = False


def is_tiktoken(content: bytes) -> bool:
    """Whether these are lines of base64 and rank; a SentencePiece model is not."""
    first = content.lstrip().split(b"\n", 1)[0].split()
    try:
        return len(first) == 2 and first[1].isdigit() and bool(base64.b64decode(first[0], validate=True))
    except binascii.Error:
        return False


def read_ranks(content: bytes) -> dict[bytes, int]:
    """Each token's bytes and rank.

    Raises:
        CheckpointError: a line is neither; names its number.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError as error:
                raise CheckpointError(f"line {number} of the tiktoken file is no token and rank: {line!r}") from error
    return ranks


def tiktoken_tokenizer(ranks: Mapping[bytes, int], layout: ByteLevelLayout) -> Tokenizer:
    """A tokenizer that gives the ids of tiktoken's `Encoding` with these ranks, without special tokens."""
    alphabet = byte_alphabet()
    vocab = {"".join(alphabet[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = merges_in_order(sorted(vocab, key=vocab.__getitem__), vocab)
    return byte_level_tokenizer(vocab, merges, layout)


def published(num_ranks: int, config: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary with this many ranks; of an unknown one, how text is cut is taken to be as in most.

    Args:
        config: config.json, which tells Llama 3 from Llama 3.1.
    """
    if num_ranks in _PUBLISHED:
        return _PUBLISHED[num_ranks]
    if num_ranks == 128000:
        return _llama3(later="rope_scaling" in config or config.get("max_position_embeddings", 8192) > 8192)
    logger.warning("a tiktoken file of %d ranks is not known here; its text is cut as by cl100k_base", num_ranks)
    return Vocabulary(LAYOUTS["llama3"])


def _llama3(*, later: bool) -> Vocabulary:
    """Llama 3's 256 special tokens; 3.1 gave names to three of those that 3 had reserved."""
    named = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>"}
    named |= {9: "<|eot_id|>"}
    if later:
        named |= {4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"}
    reserved = (place for place in range(NUM_LLAMA3_SPECIAL) if place not in named)
    texts = named | {place: f"<|reserved_special_token_{count}|>" for count, place in enumerate(reserved)}
    names = {"bos_token": named[0], "eos_token": named[1]}
    return Vocabulary(LAYOUTS["llama3"], {128000 + place: texts[place] for place in sorted(texts)}, names, True)


_END = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
_FIM = ("<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
_PUBLISHED = {
    100256: Vocabulary(  # cl100k_base
        LAYOUTS["llama3"], {**{100257 + i: text for i, text in enumerate(_FIM)}, 100276: "<|endofprompt|>"}, _END
    ),
    199998: Vocabulary(LAYOUTS["gpt-4o"], {199999: "<|endoftext|>", 200018: "<|endofprompt|>"}, _END),  # o200k_base
    151643: Vocabulary(  # the first Qwen
        LAYOUTS["qwen"], {151643 + i: text for i, text in enumerate(_QWEN)}, {"eos_token": "<|endoftext|>"}
    ),
}
