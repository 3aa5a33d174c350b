"""`vocab.json` and `merges.txt` (GPT-2, Qwen2, StarCoder2 and other older folders) as a byte-level tokenizer.

How text is cut stands in neither; the tokenizer's class or the model's type says it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from torchtune.errors import CheckpointError, UnsupportedError, did_you_mean
from torchtune.tokenizers.splits import LAYOUTS, byte_level_tokenizer

_END = "<|endoftext|>"
_GPT2_NAMES = {"bos_token": _END, "eos_token": _END, "unk_token": _END}
_QWEN_NAMES = {"eos_token": _END, "unk_token": _END, "pad_token": _END}
# Layout and the named tokens that the class gives itself where tokenizer_config.json does not say.
_CLASSES: dict[str, tuple[str, dict[str, str]]] = {
    "GPT2Tokenizer": ("gpt2", _GPT2_NAMES),
    "CodeGenTokenizer": ("gpt2", _GPT2_NAMES),
    "GPTNeoXTokenizer": ("gpt_neox", _GPT2_NAMES | {"pad_token": "<|padding|>"}),
    "Qwen2Tokenizer": ("qwen2", _QWEN_NAMES),
    "Qwen3_5Tokenizer": ("qwen3_5", _QWEN_NAMES),
}
# The model's type, where it says more than the class, or there is no class.
_DIGITS = ("gpt_bigcode", "starcoder2", "smollm3")
_MODEL_CLASSES = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", "qwen3_5": "Qwen3_5Tokenizer"}
_MODEL_CLASSES |= {"olmo": "GPTNeoXTokenizer", "gpt_neox": "GPTNeoXTokenizer", "mpt": "GPTNeoXTokenizer"}


def vocab_merges_tokenizer(
    vocab_json: bytes, merges_txt: bytes, tokenizer_config: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer, without added tokens, and the named tokens that its class brings.

    Args:
        tokenizer_config: for `tokenizer_class` and `add_prefix_space`.
        config: config.json, for `model_type`.
    Raises:
        CheckpointError: a file is damaged.
        UnsupportedError: a tokenizer class whose way to cut text is not known here.
    """
    layout, names = _layout(tokenizer_config, config)
    prefix_space = bool(tokenizer_config.get("add_prefix_space") or False)
    try:
        vocab = {str(token): int(token_id) for token, token_id in json.loads(vocab_json).items()}
        merges = _read_merges(merges_txt.decode("utf-8"))
        return byte_level_tokenizer(vocab, merges, LAYOUTS[layout], prefix_space=prefix_space), names
    except CheckpointError:
        raise
    except Exception as error:  # the library raises a bare Exception, for a merge whose parts are no tokens
        raise CheckpointError(f"vocab.json and merges.txt make no tokenizer: {error}") from error


def _layout(tokenizer_config: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    model_type = str(config.get("model_type", ""))
    name = str(tokenizer_config.get("tokenizer_class") or config.get("tokenizer_class") or "")
    name = name.removesuffix("Fast")
    if name in ("", "PreTrainedTokenizer", "TokenizersBackend"):
        # qwen2_moe, qwen3_vl and so on are read as the family that they begin with.
        family = next((known for known in sorted(_MODEL_CLASSES, reverse=True) if model_type.startswith(known)), "")
        name = _MODEL_CLASSES.get(family, "GPT2Tokenizer")
    if name not in _CLASSES:
        raise UnsupportedError(
            f"vocab.json and merges.txt of a '{name}' are not supported{did_you_mean(name, _CLASSES)}; "
            "save a tokenizer.json with the library that made them"
        )
    layout, names = _CLASSES[name]
    return ("digits" if layout == "gpt2" and model_type in _DIGITS else layout), names


def _read_merges(text: str) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line or line.startswith("#version"):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise CheckpointError(f"merges.txt: line {number} is no pair of tokens: {line!r}")
        merges.append((left, right))
    return merges
