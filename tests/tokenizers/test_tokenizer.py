"""The tokenizer's face: ids and offsets as the library gives them, and exactly one BOS (C033)."""

import json
import pickle

import pytest
from tokenizers import processors

from tests.tiny_checkpoint import tiny_tokenizer
from torchtune.errors import CheckpointError
from torchtune.tokenizers.tokenizer import Tokenizer

TEXTS = ["hello, world", "", "  two  spaces\n\n", "<|im_start|>user\nhi<|im_end|>\n", "ünïcode 🎉"]


def ours_and_theirs(adds_bos=False):
    theirs = tiny_tokenizer()
    backend = theirs.backend_tokenizer
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A $B", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    config = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}, "pad_token": "<pad>", "unk_token": None}
    return Tokenizer.from_json(backend.to_str().encode(), config), theirs


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_offsets_equal_transformers(text):
    """Nothing is added that the text does not hold."""
    ours, theirs = ours_and_theirs()
    expected = theirs(text, return_offsets_mapping=True, add_special_tokens=False)
    assert ours.encode(text).ids == expected["input_ids"]
    assert ours.encode(text).offsets == expected["offset_mapping"]
    assert [encoding.ids for encoding in ours.encode_batch(TEXTS)][TEXTS.index(text)] == expected["input_ids"]
    assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("adds_bos", [False, True])
def test_case_c033_plain_text_has_one_bos_where_the_tokenizer_adds_one(adds_bos):
    """A text that begins with it does not get a second; the EOS of a post-processor is not taken."""
    ours, _ = ours_and_theirs(adds_bos)
    plain = ours.encode("once").ids
    assert ours.encode_plain_text("once") == ([0, *plain] if adds_bos else plain)
    assert ours.encode_plain_text("<s>once") == [0, *plain]
    assert ours.encode("once").ids == plain


def test_special_tokens_by_name_and_text():
    """Texts for templates, ids for the loop."""
    ours, theirs = ours_and_theirs()
    assert ours.special == {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (0, 3, 4)
    assert ours.vocab_size == len(theirs)


def test_pickled_for_workers():
    """The copy encodes alike."""
    ours, _ = ours_and_theirs()
    copy = pickle.loads(pickle.dumps(ours))
    assert copy.encode(TEXTS[3]).ids == ours.encode(TEXTS[3]).ids
    assert copy.special == ours.special


def test_what_is_no_tokenizer_is_refused():
    """With the file's name."""
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_json(json.dumps({"model": 3}).encode())
