"""Text from tokens as they come: the same as from all of them, and cut before a stop text."""

import pytest

from tests.tiny_checkpoint import save_tiny_checkpoint
from torchtune.checkpoint.open import open_checkpoint
from torchtune.generation.text import Detokenizer

TEXTS = ["plain words, twice: plain words", "héllo 😀 wörld", "日本語のテキスト", "  two  spaces \n\n lines", "x"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return open_checkpoint(save_tiny_checkpoint(tmp_path_factory.mktemp("text") / "tiny")).tokenizer()


def pieces_of(tokenizer, text, stops=(), prompt="before "):
    ids, detokenizer = tokenizer.encode_plain_text(text), None
    detokenizer = Detokenizer(tokenizer, tokenizer.encode(prompt).ids, stops)
    pieces = []
    for end in range(1, len(ids) + 1):
        pieces.append(detokenizer.push(ids[:end]))
        if detokenizer.is_stopped:
            break
    return [*pieces, detokenizer.end()], detokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_up_the_text(tokenizer, text):
    """Characters of several tokens come whole."""
    pieces, detokenizer = pieces_of(tokenizer, text)
    assert "".join(pieces) == detokenizer.text == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(1 for piece in pieces if piece) > 1 or len(text) == 1


@pytest.mark.parametrize(
    ("stops", "left"),
    [
        (["words"], "plain "),
        (["twice: p"], "plain words, "),
        (["nowhere"], TEXTS[0]),
        (["nowhere", ", t", "ds,"], "plain wor"),
        (["p"], ""),
    ],
)
def test_case_c121_a_stop_text_is_found_across_tokens_and_never_shown(tokenizer, stops, left):
    pieces, detokenizer = pieces_of(tokenizer, TEXTS[0], stops)
    assert "".join(pieces) == detokenizer.text == left
    assert detokenizer.is_stopped == (left != TEXTS[0])
    shown = ""
    for piece in pieces:  # nothing was told that had to be taken back
        shown += piece
        assert left.startswith(shown)


def test_bytes_that_make_no_character_are_shown_at_the_end(tokenizer):
    ids = tokenizer.encode_plain_text("a😀")[:-1]
    detokenizer = Detokenizer(tokenizer, [])
    assert detokenizer.push(ids) + detokenizer.end() == tokenizer.decode(ids)
