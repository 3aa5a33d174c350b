"""The tokenizer in a GGUF file's metadata, as the content of tokenizer.json and tokenizer_config.json.

The metadata has the vocabulary, and merges or scores; how text is cut is a name in `tokenizer.ggml.pre`.
Keys: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from torchtune.errors import UnsupportedError, did_you_mean
from torchtune.tokenizers.added_tokens import DeclaredTokens, add_declared, set_bos_and_eos, special_token, user_token
from torchtune.tokenizers.sentencepiece import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNIGRAM,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceModel,
    sentencepiece_tokenizer,
)
from torchtune.tokenizers.splits import LAYOUTS, byte_alphabet, byte_level_tokenizer

_NAMES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
# How converters call the ids that have a row in the embedding and no text; no piece contains it.
_ROW_WITHOUT_TEXT, _NO_PIECE = re.compile(r"\[PAD\d+\]"), 0
# Layouts by the names that stand under `tokenizer.ggml.pre`.
_PRE = {
    "gpt2": "default gpt-2 phi-2",
    "digits": "smollm starcoder refact",
    "gpt_neox": "olmo mpt",
    "cohere": "command-r",
    "llama3": "llama3 llama-v3 llama-bpe",
    "cl100k": "falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx smaug-bpe chatglm-bpe glm4",
    "qwen2": "qwen2",
    "digit_words": "deepseek-r1-qwen kormo f2llmv2 megrez stablelm2",
    "qwen3_5": "qwen35",
    "tekken": "tekken",
    "gpt-4o": "gpt-4o llama4 kanana2 talkie minimax-m2",
    "deepseek-v3": "deepseek-v3",
    "deepseek-coder": "deepseek-coder",
}
PRE_TOKENIZERS = {name: layout for layout, names in _PRE.items() for name in names.split()}


def gguf_tokenizer(metadata: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json that encode as this metadata's tokenizer does.

    Args:
        metadata: the file's key-value pairs, arrays as sequences.
    Raises:
        UnsupportedError: a kind of tokenizer or pre-tokenizer that is not known here; names it.
    """
    kind = str(metadata.get("tokenizer.ggml.model"))
    makers = {"gpt2": _byte_level, "llama": _sentencepiece, "gemma4": _sentencepiece, "t5": _sentencepiece}
    if kind not in makers:
        raise UnsupportedError(f"tokenizer '{kind}' is not supported{did_you_mean(kind, makers)}")
    tokens = [str(token) for token in metadata["tokenizer.ggml.tokens"]]
    types = [int(number) for number in metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)]
    tokenizer = makers[kind](metadata, tokens, types)
    declared = DeclaredTokens({})
    for token_id, token_type in enumerate(types):
        # A run of spaces is a piece among others: spaces are written as ▁ before it is looked for.
        if token_type in (CONTROL, UNKNOWN) or (token_type == USER_DEFINED and tokens[token_id].strip(" ")):
            make = user_token if token_type == USER_DEFINED else special_token
            declared.by_id[token_id] = make(tokens[token_id])
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in _NAMES.items():
        named = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if named is not None:
            config[key] = tokens[named]
    tokenizer = add_declared(tokenizer, declared)
    # A llama-kind file that says nothing means BOS; Gemma 4's template writes it, whatever the flag.
    adds_bos = kind != "gemma4" and metadata.get("tokenizer.ggml.add_bos_token", kind == "llama")
    adds_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    bos, eos = config.get("bos_token") if adds_bos else None, config.get("eos_token") if adds_eos else None
    if bos or eos:
        set_bos_and_eos(tokenizer, bos, eos)
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    if context := metadata.get(f"{metadata.get('general.architecture')}.context_length"):
        config["model_max_length"] = int(context)
    return tokenizer.to_str().encode(), config


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    """Byte-level BPE, cut as `tokenizer.ggml.pre` says."""
    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    if pre not in PRE_TOKENIZERS:
        raise UnsupportedError(f"pre-tokenizer '{pre}' is not supported{did_you_mean(pre, PRE_TOKENIZERS)}")
    spelling = byte_alphabet()
    letters = set(spelling.values())
    vocab = {}
    for token_id, (token, token_type) in enumerate(zip(tokens, types, strict=True)):
        # Some converters write ordinary tokens as text; merges and library want the alphabet of bytes.
        if token_type == NORMAL and not letters.issuperset(token):
            token = "".join(spelling[byte] for byte in token.encode())
        vocab[token] = token_id
    return byte_level_tokenizer(vocab, _merges(metadata), LAYOUTS[PRE_TOKENIZERS[pre]])


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (str(merge).split(" ", 1) for merge in metadata["tokenizer.ggml.merges"])
    return [(left, right) for left, right in pairs]


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    """SentencePiece's pieces; what the model file said around them has keys of its own."""
    kind = metadata["tokenizer.ggml.model"]
    is_gemma = str(metadata.get("general.architecture", "")).startswith("gemma")
    # Runs of spaces are stored as such, though pieces write a space as ▁.
    texts = [SPACE * len(token) if token and not token.strip(" ") else token for token in tokens]
    types = [
        _NO_PIECE if kind == UNUSED and _ROW_WITHOUT_TEXT.fullmatch(token) else kind
        for token, kind in zip(tokens, types, strict=True)
    ]
    scores = metadata.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    model = SentencePieceModel(
        pieces=[(text, float(score), kind) for text, score, kind in zip(texts, scores, types, strict=True)],
        kind=UNIGRAM if kind == "t5" else BPE,
        merges=_merges(metadata) if "tokenizer.ggml.merges" in metadata else None,
        byte_fallback=BYTE in types or any(_BYTE_PIECE.fullmatch(token) for token in tokens),
        unk_id=int(metadata.get("tokenizer.ggml.unknown_token_id", 2 if kind == "t5" else 0)),
        charsmap=bytes(int(byte) & 255 for byte in metadata.get("tokenizer.ggml.precompiled_charsmap", ())),
        add_dummy_prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", not is_gemma)),
        remove_extra_whitespaces=bool(metadata.get("tokenizer.ggml.remove_extra_whitespaces", kind == "t5")),
    )
    return sentencepiece_tokenizer(model, layout="gemma" if is_gemma else "sentencepiece")
