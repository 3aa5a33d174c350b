"""A tokenizer as a GGUF file's metadata: the inverse of gguf.py.

How text is cut becomes a name that llama.cpp knows; which one is found by cutting texts both ways. What is made is
read back and compared before it is given out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models

from torchtune.errors import UnsupportedError
from torchtune.tokenizers.gguf import PRE_TOKENIZERS, gguf_tokenizer
from torchtune.tokenizers.sentencepiece import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED, read_model
from torchtune.tokenizers.splits import LAYOUTS, byte_level_tokenizer
from torchtune.tokenizers.tokenizer import Tokenizer

# The name that llama.cpp's converters write for each way to cut, and those of families that have one of their own.
PREFERRED = {
    "gpt2": "gpt-2",
    "digits": "smollm",
    "gpt_neox": "olmo",
    "cohere": "command-r",
    "llama3": "llama-bpe",
    "cl100k": "dbrx",
    "qwen2": "qwen2",
    "digit_words": "deepseek-r1-qwen",
    "qwen3_5": "qwen35",
    "tekken": "tekken",
    "gpt-4o": "gpt-4o",
    "deepseek-v3": "deepseek-v3",
    "deepseek-coder": "deepseek-coder",
}
OWN_NAMES = {
    "chatglm": "chatglm-bpe",
    "glm4": "glm4",
    "glm4moe": "glm4",
    "llama4": "llama4",
    "phi2": "phi-2",
    "smollm3": "smaug-bpe",
    "stablelm": "stablelm2",
    "starcoder2": "starcoder",
}
# Texts that no two of the layouts cut alike, and what people write.
PROBES = (
    "Hello, world! It's 1234567 o'clock; WE'LL see, I'M sure they'd've known.",
    "naïve café e\u0301 – 日本語のテキスト、ひらがな 한국어 мир 🙂🙃 ½ ١٢٣",
    "def f(x):\n\treturn x  # two  spaces\n\n\n    if x:\r\n\r\n",
    "  leading and trailing   \n \t ",
    "a/b//c\n/d camelCaseHTTPServer ABCdef fooBAR _under_score__ $x += [1,2]; <tag attr='v'/>",
    "İstanbul ǅ ʰ हिन्दी ภาษาไทย \u00a0\u2003wide ... !!!\n\n?? --flag=3.14e-10",
)


@dataclass
class WrittenTokenizer:
    """What is written, and what was noticed.

    Attributes:
        keys: whole, with `tokenizer.` before them.
        notes: what a reader of the file will do otherwise, for people.
    """

    keys: dict[str, Any]
    notes: list[str]


def tokenizer_keys(
    tokenizer: Tokenizer,
    *,
    architecture: str,
    num_rows: int,
    stop_ids: Sequence[int],
    chat_template: str | Mapping[str, str] | None,
    sentencepiece: bytes | None = None,
) -> WrittenTokenizer:
    """The metadata of a tokenizer.

    Args:
        architecture: of the file; some have names of their own for a way to cut.
        num_rows: rows of the embedding: the file has a token for each.
        stop_ids: what generation ends on.
        sentencepiece: the content of a tokenizer.model beside it, which has the scores.
    Raises:
        UnsupportedError: a kind of tokenizer, or a way to cut text, that llama.cpp has no name for.
    """
    content = json.loads(tokenizer.to_json())
    fast = FastTokenizer.from_str(json.dumps(content))
    if content["model"]["type"] != "BPE":
        raise UnsupportedError(
            f"a tokenizer of kind '{content['model']['type']}' can't be written to a GGUF file; BPE can"
        )
    notes: list[str] = []
    tokens, types = _tokens(tokenizer, content, num_rows, notes)
    keys = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if '"ByteLevel"' in json.dumps([content["pre_tokenizer"], content["decoder"]]):
        keys |= _byte_level(fast, content, architecture)
    else:
        keys |= _pieces(fast, content, tokens, types, sentencepiece)
    unknown = content["model"].get("unk_token") or tokenizer.special.get("unk_token")
    keys |= _special(tokenizer, num_rows, stop_ids, notes, unknown=unknown)
    keys |= _templates(chat_template)
    keys = {"tokenizer.ggml.model": keys.pop("tokenizer.ggml.model"), **keys}
    _prove(tokenizer, keys, architecture, notes)
    return WrittenTokenizer(keys, notes)


def _tokens(
    tokenizer: Tokenizer, content: Mapping[str, Any], num_rows: int, notes: list[str]
) -> tuple[list[str], list[int]]:
    """Text and type of each id; rows without a token get one that no text gives.

    Raises:
        UnsupportedError: the vocabulary is larger than the embedding.
    """
    vocab: dict[str, int] = dict(content["model"]["vocab"])
    unknown = content["model"].get("unk_token")
    texts = {token_id: (text, NORMAL) for text, token_id in vocab.items()}
    if content["model"].get("byte_fallback"):
        pieces = {f"<0x{byte:02X}>" for byte in range(256)}
        texts |= {vocab[piece]: (piece, BYTE) for piece in pieces & vocab.keys()}
    special = tokenizer.special_tokens
    for text, token_id in tokenizer.added_tokens.items():
        texts[token_id] = (text, CONTROL if text in special else USER_DEFINED)
    if unknown in vocab:
        texts[vocab[unknown]] = (unknown, UNKNOWN)
    beyond = {token_id: text for token_id, (text, _) in texts.items() if token_id >= num_rows}
    if any(text not in tokenizer.added_tokens for text in beyond.values()):
        raise UnsupportedError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the embedding {num_rows} rows; a GGUF file has as many"
        )
    if beyond:
        notes.append(f"left out, since the embedding has no row for them: {', '.join(beyond.values())}")
    rows = [texts.get(row, (f"[PAD{row}]", UNUSED)) for row in range(num_rows)]
    return [text for text, _ in rows], [kind for _, kind in rows]


def _merges(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in content["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _byte_level(fast: FastTokenizer, content: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_name(fast, content, architecture),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in _merges(content)],
        "tokenizer.ggml.add_space_prefix": False,
    }


def _pre_name(fast: FastTokenizer, content: Mapping[str, Any], architecture: str) -> str:
    """What llama.cpp calls the way in which a tokenizer cuts text.

    Raises:
        UnsupportedError: none of those that are known here cuts like it.
    """
    cuts = [_cut(fast, text) for text in PROBES]
    takes_whole = bool(content["model"].get("ignore_merges"))
    found = [
        name
        for name in PREFERRED
        if [_cut(byte_level_tokenizer({}, [], LAYOUTS[name]), text) for text in PROBES] == cuts
    ]
    # The same cut, with or without taking a piece that is a token whole; where merges reach every token it is one.
    same = [name for name in found if LAYOUTS[name].whole_first == takes_whole]
    if not same and found and _merges_reach_all(content):
        same = found
    if not same:
        raise UnsupportedError(
            "the tokenizer cuts text in a way that llama.cpp has no name for, or none that is known here: "
            f"{_cut(fast, PROBES[0])[:6]}..."
        )
    own = OWN_NAMES.get(architecture)
    return own if own is not None and PRE_TOKENIZERS[own] in same else PREFERRED[same[0]]


def _cut(fast: FastTokenizer, text: str) -> list[str]:
    """A text's pieces before merging."""
    text = fast.normalizer.normalize_str(text) if fast.normalizer is not None else text
    return [piece for piece, _ in fast.pre_tokenizer.pre_tokenize_str(text)] if fast.pre_tokenizer else [text]


def _merges_reach_all(content: Mapping[str, Any]) -> bool:
    """Whether every token is what its own text is merged to."""
    vocab = content["model"]["vocab"]
    model = models.BPE(vocab, _merges(content))
    added = {token["content"] for token in content["added_tokens"]}
    return all(len(model.tokenize(text)) == 1 for text in vocab if text not in added)


def _pieces(
    fast: FastTokenizer, content: Mapping[str, Any], tokens: list[str], types: list[int], sentencepiece: bytes | None
) -> dict[str, Any]:
    """SentencePiece's kind: scores in place of merges."""
    scores = _scores(content, tokens, sentencepiece)
    for row, kind in enumerate(types):
        # llama.cpp looks for these in the text itself, where a space is a space.
        if kind == USER_DEFINED and tokens[row] and not tokens[row].strip(SPACE):
            tokens[row] = " " * len(tokens[row])
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": _cut(fast, "a")[0].startswith(SPACE),
        "tokenizer.ggml.remove_extra_whitespaces": SPACE * 2 not in "".join(_cut(fast, "a  b")),
    }


def _scores(content: Mapping[str, Any], tokens: Sequence[str], sentencepiece: bytes | None) -> list[float]:
    """The model file's, or such that the best pair is the one that is merged first."""
    if sentencepiece is not None:
        pieces = read_model(sentencepiece).pieces
        by_text = {text: score for text, score, _ in pieces}
        if all(by_text.get(text) is not None for text in content["model"]["vocab"]):
            return [by_text.get(text, 0.0) for text in tokens]
    merges = _merges(content)
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    alone = iter(range(len(merges), len(merges) + len(tokens)))
    return [-float(ranks[text] if text in ranks else next(alone)) for text in tokens]


def _special(
    tokenizer: Tokenizer, num_rows: int, stop_ids: Sequence[int], notes: list[str], *, unknown: str | None
) -> dict[str, Any]:
    """The ids that have a name. What ends a generation comes first under `eos`, then under `eot` and `eom`."""
    stops = list(dict.fromkeys(stop_ids))
    if tokenizer.eos_id in stops:
        stops.insert(0, stops.pop(stops.index(tokenizer.eos_id)))
    elif not stops and tokenizer.eos_id is not None:
        stops = [tokenizer.eos_id]
    if len(stops) > 3:
        named = ", ".join(str(tokenizer.id_to_token(token_id)) for token_id in stops[3:])
        notes.append(f"a GGUF file names three tokens that end a generation; not named: {named}")
    ids = {
        "bos": tokenizer.bos_id,
        **dict(zip(("eos", "eot", "eom"), stops[:3], strict=False)),
        "unknown": None if unknown is None else tokenizer.token_id(unknown),
        "seperator": tokenizer.sep_id,  # spelled so by the format
        "padding": tokenizer.pad_id,
        "mask": tokenizer.mask_id,
    }
    keys: dict[str, Any] = {
        f"tokenizer.ggml.{name}_token_id": token_id
        for name, token_id in ids.items()
        if token_id is not None and token_id < num_rows
    }
    return keys | {
        "tokenizer.ggml.add_bos_token": tokenizer.adds_bos,
        "tokenizer.ggml.add_eos_token": tokenizer.adds_eos,
    }


def _templates(chat_template: str | Mapping[str, str] | None) -> dict[str, Any]:
    if chat_template is None:
        return {}
    named = {"default": chat_template} if isinstance(chat_template, str) else dict(chat_template)
    keys: dict[str, Any] = {"tokenizer.chat_template": named.pop("default")} if "default" in named else {}
    if named:
        keys["tokenizer.chat_templates"] = sorted(named)
    return keys | {f"tokenizer.chat_template.{name}": template for name, template in named.items()}


def _prove(tokenizer: Tokenizer, keys: Mapping[str, Any], architecture: str, notes: list[str]) -> None:
    """Read what is written and compare ids, of texts and of texts with added tokens among them.

    Raises:
        UnsupportedError: it would give other ids; with the text.
    """
    read = Tokenizer.from_json(*gguf_tokenizer({**keys, "general.architecture": architecture}))
    for text in PROBES:
        if read.encode(text).ids == tokenizer.encode(text).ids:
            continue
        if text.startswith(" ") and keys["tokenizer.ggml.model"] == "llama":
            # Tokenizer classes differ here from SentencePiece, and so from readers of the file.
            notes.append("a text that begins with a space is cut otherwise by a reader of the file")
        else:
            raise UnsupportedError(
                f"the tokenizer can't be written to a GGUF file: it would give other ids, for {text[:40]!r} "
                f"{_first_other(tokenizer.encode(text).ids, read.encode(text).ids)}"
            )
    for token in tokenizer.added_tokens:
        text = f"one{token}two {token} three"
        expected, found = tokenizer.encode(text).ids, read.encode(text).ids
        if expected != found:
            notes.append(
                f"around added tokens a reader of the file cuts text otherwise: {text!r} {_first_other(expected, found)}"
            )
            return


def _first_other(expected: Sequence[int], found: Sequence[int]) -> str:
    place = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), len(expected))
    return f"{list(expected[place : place + 4])} would become {list(found[place : place + 4])}"
