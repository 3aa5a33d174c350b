"""How byte-level vocabularies cut a text before merging, by the names that checkpoints give it.

The patterns are those of the families' published tokenizer.json files; GPT-2's is built into the library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN3_5 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = rf"{_WORDS[0]}|{_WORDS[1]}|\p{{N}}|{_REST}"
GPT_4O = rf"{_WORDS[0]}{_SHORT}|{_WORDS[1]}{_SHORT}|\p{{N}}{{1,3}}|{_REST}"
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+")


@dataclass(frozen=True)
class ByteLevelLayout:
    """What stands around the merges of a byte-level vocabulary.

    Attributes:
        patterns: each cuts what the one before it left; none: GPT-2's own.
        single_digits: every digit is a piece of its own, cut first (GPT-2's pattern) or last (given patterns).
        composed: the text is brought to Unicode's form NFC.
        whole_first: a piece that is a token is taken whole, as tiktoken does, whatever its merges.
    """

    patterns: tuple[str, ...] = ()
    single_digits: bool = False
    composed: bool = False
    whole_first: bool = False


LAYOUTS = {
    "gpt2": ByteLevelLayout(),
    "digits": ByteLevelLayout(single_digits=True),
    "gpt_neox": ByteLevelLayout(composed=True),
    "cohere": ByteLevelLayout(single_digits=True, composed=True),
    "llama3": ByteLevelLayout((LLAMA3,), whole_first=True),
    "cl100k": ByteLevelLayout((LLAMA3,)),
    "qwen": ByteLevelLayout((QWEN2,), whole_first=True),
    "digit_words": ByteLevelLayout((QWEN2,)),
    "qwen2": ByteLevelLayout((QWEN2,), composed=True),
    "qwen3_5": ByteLevelLayout((QWEN3_5,), composed=True),
    "tekken": ByteLevelLayout((TEKKEN,), whole_first=True),
    "gpt-4o": ByteLevelLayout((GPT_4O,), whole_first=True),
    "deepseek-v3": ByteLevelLayout(DEEPSEEK_V3),
    "deepseek-coder": ByteLevelLayout(DEEPSEEK_CODER, single_digits=True),
}


def byte_level_tokenizer(
    vocab: Mapping[str, int], merges: list[tuple[str, str]], layout: ByteLevelLayout, *, prefix_space: bool = False
) -> Tokenizer:
    """A byte-level BPE tokenizer: the vocabulary, cut as `layout` says.

    Args:
        vocab: tokens, in the alphabet that gives each byte a printable character, and their ids.
        merges: pairs of such tokens, the first one merged first.
        prefix_space: a text gets a space before its first word.
    """
    tokenizer = Tokenizer(models.BPE(dict(vocab), merges, ignore_merges=layout.whole_first))
    if layout.composed:
        tokenizer.normalizer = normalizers.NFC()
    digits: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if layout.single_digits else []
    if layout.patterns:
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in layout.patterns]
        steps = [*splits, *digits, pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)]
    else:
        steps = [*digits, pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=True)]
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_alphabet() -> dict[int, str]:
    """The printable character by which byte-level vocabularies write each byte; GPT-2's choice."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}
