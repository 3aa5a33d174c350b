"""Tokenizers in GGUF metadata, against the tokenizer that the metadata was made from."""

import json

import pytest
import sentencepiece
from tokenizers import Tokenizer as FastTokenizer

from tests.tiny_checkpoint import SPECIAL
from tests.trained_vocabularies import TEXTS, byte_level_files, python_lines, random_texts, sentencepiece_model
from torchtune.errors import UnsupportedError
from torchtune.tokenizers.gguf import PRE_TOKENIZERS, gguf_tokenizer
from torchtune.tokenizers.sentencepiece import UNIGRAM, USER_DEFINED, read_model
from torchtune.tokenizers.splits import LAYOUTS, byte_level_tokenizer
from torchtune.tokenizers.tokenizer import Tokenizer


def sentencepiece_metadata(kind):
    """As converters write it: user-defined runs of spaces as spaces, the character map as signed bytes."""
    model = read_model(sentencepiece_model(kind))
    tokens = [
        " " * len(text) if kind == USER_DEFINED and not text.strip("▁") else text for text, _, kind in model.pieces
    ]
    metadata = {
        "general.architecture": "gemma3" if kind == "gemma" else "llama",
        "tokenizer.ggml.model": "t5" if model.kind == UNIGRAM else "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [score for _, score, _ in model.pieces],
        "tokenizer.ggml.token_type": [piece_kind for _, _, piece_kind in model.pieces],
        "tokenizer.ggml.bos_token_id": model.bos_id,
        "tokenizer.ggml.eos_token_id": model.eos_id,
        "tokenizer.ggml.unknown_token_id": model.unk_id,
        "tokenizer.ggml.add_space_prefix": model.add_dummy_prefix,
        "tokenizer.ggml.remove_extra_whitespaces": model.remove_extra_whitespaces,
    }
    if model.charsmap:
        signed = [byte - 256 if byte > 127 else byte for byte in model.charsmap]
        metadata["tokenizer.ggml.precompiled_charsmap"] = signed
    return metadata


def byte_level_metadata(pre):
    vocab = json.loads(byte_level_files()["vocab.json"])
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": sorted(vocab, key=vocab.get),
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in sorted(vocab, key=vocab.get)],
        "tokenizer.ggml.merges": byte_level_files()["merges.txt"].decode().splitlines()[1:],
    }


@pytest.mark.parametrize("kind", ["llama", "gemma", "unigram", "unigram with bytes"])
def test_sentencepiece_kinds_equal_the_source_model(kind):
    """What the model file says is found again in the metadata."""
    tokenizer = Tokenizer.from_json(*gguf_tokenizer(sentencepiece_metadata(kind)))
    library = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(kind))
    for text in [*TEXTS, *python_lines(), *random_texts(100)]:
        assert tokenizer.encode(text).ids == library.encode(text), text
    assert tokenizer.bos_id == library.bos_id()
    assert tokenizer.adds_bos == (library.encode("") == [] and not kind.startswith("unigram"))
    assert tokenizer.encode("a<unk>b").ids.count(library.unk_id()) == 1


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level_kinds_cut_as_their_layout_says(pre):
    """The library reads what is written; control tokens are special."""
    content, config = gguf_tokenizer(byte_level_metadata(pre))
    vocab = json.loads(byte_level_files()["vocab.json"])
    merges = [tuple(merge.split(" ")) for merge in byte_level_metadata(pre)["tokenizer.ggml.merges"]]
    source = byte_level_tokenizer(vocab, merges, LAYOUTS[PRE_TOKENIZERS[pre]])
    written, tokenizer = FastTokenizer.from_buffer(content), Tokenizer.from_json(content, config)
    for text in [*TEXTS, *random_texts(30)]:
        assert written.encode(text).ids == source.encode(text).ids
    assert tokenizer.special_tokens == {token: vocab[token] for token in SPECIAL}


# Facts of the published tokenizers: how each cuts this text.
@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", "a|1234|'|S|Ġit|'s|Ġ|Ċ|x"),
        ("smollm", "a|1|2|3|4|'|S|Ġit|'s|Ġ|Ċ|x"),
        ("llama-bpe", "a|123|4|'S|Ġit|'s|ĠĊ|x"),
        ("qwen2", "a|1|2|3|4|'S|Ġit|'s|ĠĊ|x"),
        ("tekken", "a|1|2|3|4|'S|Ġit|'s|ĠĊ|x"),
        ("gpt-4o", "a|123|4|'S|Ġit's|ĠĊ|x"),
        ("deepseek-v3", "a|123|4|'S|Ġit|'s|ĠĊ|x"),
    ],
)
def test_text_is_cut_as_published(pre, pieces):
    """Digits, contractions and line ends are where families differ."""
    tokenizer = FastTokenizer.from_buffer(gguf_tokenizer(byte_level_metadata(pre))[0])
    cut = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("a1234'S it's \nx")]
    assert cut == pieces.split("|")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer 'bert'"),
        ({"tokenizer.ggml.pre": "deepseek-llm"}, "pre-tokenizer 'deepseek-llm'"),
        ({"tokenizer.ggml.pre": "qwen-2"}, "did you mean 'qwen2'"),
    ],
)
def test_what_is_not_known_is_named(change, said):
    """With the nearest known name."""
    with pytest.raises(UnsupportedError, match=said):
        gguf_tokenizer(byte_level_metadata("qwen2") | change)
