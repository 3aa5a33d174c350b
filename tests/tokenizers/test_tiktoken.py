"""tiktoken files, against the tiktoken library."""

import pytest
import tiktoken

from tests.trained_vocabularies import (
    TEXTS,
    python_lines,
    random_texts,
    sentencepiece_model,
    tiktoken_file,
    tiktoken_ranks,
)
from torchtune.tokenizers.files import open_tokenizer
from torchtune.tokenizers.splits import GPT_4O, LAYOUTS, LLAMA3, QWEN2, TEKKEN
from torchtune.tokenizers.tiktoken import is_tiktoken, published, read_ranks, tiktoken_tokenizer


@pytest.mark.parametrize(
    ("layout", "pattern"), [("llama3", LLAMA3), ("qwen", QWEN2), ("gpt-4o", GPT_4O), ("tekken", TEKKEN)]
)
def test_ids_equal_tiktoken(layout, pattern):
    """Merges are found again from the ranks."""
    theirs = tiktoken.Encoding("tiny", pat_str=pattern, mergeable_ranks=tiktoken_ranks(), special_tokens={})
    ours = tiktoken_tokenizer(tiktoken_ranks(), LAYOUTS[layout])
    for text in [*TEXTS, *python_lines(), *random_texts(200)]:
        assert ours.encode(text).ids == theirs.encode(text, disallowed_special=()), text


def test_a_file_is_told_from_a_sentencepiece_model():
    """Both are called tokenizer.model."""
    assert is_tiktoken(tiktoken_file(tiktoken_ranks()))
    assert not is_tiktoken(sentencepiece_model("llama"))
    assert read_ranks(tiktoken_file(tiktoken_ranks())) == tiktoken_ranks()


def test_a_tiktoken_file_under_its_own_name(tmp_path):
    """`qwen.tiktoken` and the like."""
    tokenizer = open_tokenizer({"some.tiktoken": tiktoken_file(tiktoken_ranks())})
    assert tokenizer.decode(tokenizer.encode("naïve 🎉").ids) == "naïve 🎉"


def test_the_special_tokens_of_llama_3_have_their_published_ids():
    """By name: Llama 3's model card, and what Llama 3.1 made of three reserved ones."""
    first, later = published(128000, {}), published(128000, {"rope_scaling": {"factor": 8.0}})
    assert len(first.special) == len(set(first.special.values())) == len(later.special) == 256
    for vocabulary in (first, later):
        assert vocabulary.special[128000] == "<|begin_of_text|>"
        assert vocabulary.special[128006] == "<|start_header_id|>"
        assert vocabulary.special[128009] == "<|eot_id|>"
    assert [first.special[128000 + i] for i in (2, 5, 8, 255)] == [
        f"<|reserved_special_token_{i}|>" for i in (0, 3, 4, 250)
    ]
    assert [later.special[128000 + i] for i in (4, 8, 10)] == [
        "<|finetune_right_pad_id|>",
        "<|eom_id|>",
        "<|python_tag|>",
    ]
    assert [later.special[128000 + i] for i in (5, 11, 255)] == [f"<|reserved_special_token_{i}|>" for i in (2, 3, 247)]
