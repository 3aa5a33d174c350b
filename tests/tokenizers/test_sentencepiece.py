"""SentencePiece models, against the sentencepiece library itself."""

from functools import cache

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trained_vocabularies import KINDS, TEXTS, python_lines, random_texts, sentencepiece_model
from torchtune.errors import CheckpointError, UnsupportedError
from torchtune.tokenizers.files import open_tokenizer
from torchtune.tokenizers.sentencepiece import (
    BYTE,
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceModel,
    read_model,
    sentencepiece_tokenizer,
)


@cache
def theirs(kind):
    return sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_file_is_read_whole(kind):
    """Every piece and score as the library reads them, every option as the trainer was given it."""
    model, library, options = read_model(sentencepiece_model(kind)), theirs(kind), KINDS[kind]
    ids = range(library.vocab_size())
    assert [piece[:2] for piece in model.pieces] == [(library.id_to_piece(i), library.get_score(i)) for i in ids]
    for number, holds in ((UNKNOWN, library.is_unknown), (CONTROL, library.is_control), (BYTE, library.is_byte)):
        assert [i for i in ids if model.pieces[i][2] == number] == [i for i in ids if holds(i)]
    assert model.texts(USER_DEFINED) == options.get("user_defined_symbols", [])
    assert model.kind == {"unigram": 1, "bpe": 2}[options["model_type"]]
    ids = {name: getattr(library, name)() for name in ("unk_id", "bos_id", "eos_id", "pad_id")}
    assert ids == {name: getattr(model, name) for name in ids}
    assert model.byte_fallback == options.get("byte_fallback", False)
    for name in ("add_dummy_prefix", "remove_extra_whitespaces"):
        assert getattr(model, name) == options.get(name, True), name
    assert bool(model.charsmap) == (options.get("normalization_rule_name") != "identity")


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_equal_sentencepiece(kind):
    """Merges that follow from scores, bytes for what is unknown, spaces kept or dropped as the model says."""
    tokenizer, library = open_tokenizer({"tokenizer.model": sentencepiece_model(kind)}), theirs(kind)
    for text in [*TEXTS, *python_lines(), *random_texts(200)]:
        ids = library.encode(text)
        assert tokenizer.encode(text).ids == ids, text
        if library.unk_id() not in ids:
            assert tokenizer.decode(ids) == library.decode(ids), text


# NFKC is left out: the library replaces whole graphemes, SentencePiece the longest match; see the module.
@pytest.mark.parametrize("kind", ["llama", "gemma"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_has_the_ids_of_sentencepiece(kind, text):
    """All of Unicode; tokens written in the text aside."""
    tokenizer = _opened(kind)
    if not any(token in text for token in tokenizer.special_tokens):
        assert tokenizer.encode(text).ids == theirs(kind).encode(text)


@cache
def _opened(kind):
    return open_tokenizer({"tokenizer.model": sentencepiece_model(kind)})


def test_named_tokens_come_from_the_model():
    """A folder with nothing but a tokenizer.model knows its BOS, EOS and unknown token."""
    tokenizer = open_tokenizer({"tokenizer.model": sentencepiece_model("gemma")}, {"model_type": "gemma"})
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 1, 0)
    assert tokenizer.special["unk_token"] == "<unk>"


def test_offsets_say_where_each_piece_came_from():
    """In characters of the text as it was given, the added space apart."""
    tokenizer = open_tokenizer({"tokenizer.model": sentencepiece_model("llama")})
    text = "return é 日本 x"
    encoding = tokenizer.encode(text)
    for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        piece = tokenizer.id_to_token(token_id)
        if piece != "▁" and not piece.startswith("<0x"):
            assert text[start:end].strip() == piece.strip("▁")
    assert encoding.offsets[-1][1] == len(text)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"kind": 3}, "word"), ({"space_at_end": True}, "suffix"), ({"kind": 2, "pieces": [("a", 0.0, 5)]}, "unused")],
)
def test_what_the_library_cannot_do_is_refused_by_name(change, said):
    """Rather than encoded nearly alike."""
    with pytest.raises(UnsupportedError, match=said):
        sentencepiece_tokenizer(SentencePieceModel(**({"pieces": [("a", 0.0, 1)]} | change)))


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x0a\xff", b"\x00" * 9])
def test_what_is_no_model_is_refused(content):
    """A pointer of git-lfs, an empty and a cut file: the file is named."""
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        open_tokenizer({"tokenizer.model": content})
