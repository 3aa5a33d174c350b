"""New tokens: one id each, in ours and in transformers, and nothing else moved."""

import json

import pytest
from transformers import AutoTokenizer

from tests.tiny_checkpoint import tiny_tokenizer
from tests.tokenizers.test_files import FOLDERS
from tests.trained_vocabularies import TEXTS, write_files
from torchtune.errors import CheckpointError
from torchtune.tokenizers.files import open_tokenizer
from torchtune.tokenizers.grow import add_tokens

NEW = ["<|think|>", "[[x]]", "<|thinking|>"]
WITH_NEW = ["a<|think|>b [[x]] <|thinking|><|think|>", "<|think|>\n[[x]]"]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", FOLDERS)
def test_new_tokens_are_one_id_in_ours_and_in_transformers(name, special, tmp_path):
    """At the next free ids, in order; a text without them keeps its ids."""
    files, model_type = FOLDERS[name]()
    config = {"model_type": model_type}
    files = write_files(tmp_path / "source", files, config)
    before = open_tokenizer(files, config)
    grown = add_tokens(files, NEW, special=special, config=config)
    write_files(tmp_path / "grown", grown, config)
    ours, theirs = open_tokenizer(grown, config), AutoTokenizer.from_pretrained(tmp_path / "grown")
    expected = list(range(before.vocab_size, before.vocab_size + len(NEW)))
    assert [ours.token_id(token) for token in NEW] == theirs.convert_tokens_to_ids(NEW) == expected
    assert all(ours.encode(token).ids == [i] for token, i in zip(NEW, expected, strict=True))
    for text in WITH_NEW:
        assert ours.encode(text).ids == theirs(text, add_special_tokens=False)["input_ids"]
    for text in TEXTS:
        assert ours.encode(text).ids == before.encode(text).ids
    assert (NEW[0] in ours.special_tokens) == special
    assert (theirs.decode(expected[:1], skip_special_tokens=True) == "") == special


def test_growing_twice_adds_up():
    """The second time, the first ones are there."""
    files = {"tokenizer.json": tiny_tokenizer().backend_tokenizer.to_str().encode()}
    tokenizer = open_tokenizer(add_tokens(add_tokens(files, NEW[:1]), NEW[1:]))
    assert tokenizer.encode("".join(NEW)).ids == [400, 401, 402]


def test_a_gap_in_the_ids_is_jumped():
    """The library would number on from the count of tokens, and take another's id."""
    content = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    content["model"]["vocab"]["far"] = 402
    grown = open_tokenizer(add_tokens({"tokenizer.json": json.dumps(content).encode()}, NEW))
    assert [grown.token_id(token) for token in ["far", *NEW]] == [402, 403, 404, 405]


def test_files_that_list_added_tokens_list_the_new_ones():
    """Older readers look there; a file that was not there stays away."""
    files = {
        "tokenizer.json": tiny_tokenizer().backend_tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps({"additional_special_tokens": ["<s>"]}).encode(),
        "added_tokens.json": b"{}",
    }
    grown = add_tokens(files, ["<|think|>"])
    assert json.loads(grown["tokenizer_config.json"])["additional_special_tokens"] == ["<s>", "<|think|>"]
    assert json.loads(grown["added_tokens.json"]) == {"<|think|>": 400}
    assert "special_tokens_map.json" not in grown


@pytest.mark.parametrize(
    ("token", "said"),
    [("", "'' is empty"), (" x", "' x' begins"), ("x\n", "begins or ends with"), ("<s>", r"'<s>' is a token.*id 0")],
)
def test_a_token_that_can_not_be_added_is_refused_by_name(token, said):
    """All of them at once."""
    files = {"tokenizer.json": tiny_tokenizer().backend_tokenizer.to_str().encode()}
    with pytest.raises(CheckpointError, match=said) as caught:
        add_tokens(files, [token, "<|twice|>", "<|twice|>"])
    assert "'<|twice|>' is named twice" in str(caught.value)
