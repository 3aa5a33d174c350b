"""Small vocabularies trained with the real trainers, and texts that tokenizers trip over."""

from __future__ import annotations

import base64
import io
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece

from tests.tiny_checkpoint import SPECIAL, tiny_tokenizer
from torchtune.tokenizers.splits import byte_alphabet

TEXTS = [
    "",
    " ",
    "hello world",
    " a leading space",
    "  two  spaces  ",
    "\n\nfoo\n\n\tbar\r\n",
    "def f(x):\n    return x + 12345\n",
    "日本語 текст العربية हिन्दी 한국어",
    "🎉🚀👩\u200d👩\u200d👧 e\u0301 ﬁ ① Å",
    "a\x00b\x07c",
    "▁under ▁",
    "don't I'LL 3.14",
]
# Written in a text, these are tokens to Hugging Face's readers and plain text to SentencePiece.
SPECIAL_TEXTS = ["</s>foo <s> bar</s>", "<unk>x", "x<start_of_turn>y <start_of_turn>"]
_POOL = "abcdefst  \n\t0129éßžя日🎉▁.,()_"
_LLAMA = {
    "model_type": "bpe",
    "vocab_size": 600,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
}
_GEMMA = _LLAMA | {
    "add_dummy_prefix": False,
    "pad_id": 0,
    "eos_id": 1,
    "bos_id": 2,
    "unk_id": 3,
    "bos_piece": "<bos>",
    "eos_piece": "<eos>",
    "control_symbols": ["<mask>", "<start_of_turn>"],
    "user_defined_symbols": ["\n\n", "▁▁", "▁▁▁▁", "<table>"],
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "gemma": _GEMMA,
    "bpe with nfkc": {"model_type": "bpe", "vocab_size": 500},
    "unigram": {"model_type": "unigram", "vocab_size": 400},
    "unigram with bytes": {
        "model_type": "unigram",
        "vocab_size": 600,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["<sep>"],
    },
}


def random_texts(count: int) -> list[str]:
    """Short mixtures of scripts, spaces and signs; the same ones each time."""
    chance = random.Random(0)
    return ["".join(chance.choices(_POOL, k=chance.randint(1, 30))) for _ in range(count)]


@cache
def python_lines() -> list[str]:
    """Lines of Python's own sources: words, where merges compete."""
    paths = sorted(Path(json.__file__).parent.glob("*.py"))
    return [line for path in paths for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


@cache
def sentencepiece_model(kind: str) -> bytes:
    """The content of a `tokenizer.model`."""
    lines = python_lines() + ["Příliš žluťoučký kůň", "日本語のテキスト", "Привет, мир!"] * 10
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=content,
        character_coverage=0.995,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **KINDS[kind],
    )
    return content.getvalue()


@cache
def byte_level_files() -> dict[str, bytes]:
    """`vocab.json` and `merges.txt` of the tiny byte-level tokenizer."""
    model = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    merges = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]
    return {"vocab.json": json.dumps(model["vocab"]).encode(), "merges.txt": "\n".join(merges).encode()}


@cache
def tiktoken_ranks() -> dict[bytes, int]:
    """The same vocabulary without its special tokens, as tiktoken holds one."""
    vocab = json.loads(byte_level_files()["vocab.json"])
    byte_of = {letter: byte for byte, letter in byte_alphabet().items()}
    tokens = [bytes(byte_of[letter] for letter in token) for token in vocab if token not in SPECIAL]
    return {token: rank for rank, token in enumerate(sorted(tokens, key=lambda token: len(token) > 1))}


def tiktoken_file(ranks: dict[bytes, int]) -> bytes:
    """The content of a tiktoken file."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def write_files(folder: Path, files: dict[str, Any], config: dict[str, Any]) -> dict[str, bytes]:
    """Write them and `config` as config.json into a new folder; objects as JSON. Returns contents, config apart."""
    folder.mkdir(parents=True)
    contents = {name: json.dumps(v).encode() if isinstance(v, dict) else v for name, v in files.items()}
    for name, content in (contents | {"config.json": json.dumps(config).encode()}).items():
        (folder / name).write_bytes(content)
    return contents
