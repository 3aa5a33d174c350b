"""Tokenizers from whatever a folder holds, against transformers' AutoTokenizer on the same folder."""

import json

import pytest
from transformers import AutoTokenizer

from tests.tiny_checkpoint import tiny_tokenizer
from tests.trained_vocabularies import (
    SPECIAL_TEXTS,
    TEXTS,
    byte_level_files,
    random_texts,
    sentencepiece_model,
    tiktoken_file,
    tiktoken_ranks,
    write_files,
)
from torchtune.checkpoint.open import open_checkpoint, open_tokenizer_files
from torchtune.errors import CheckpointError, UnsupportedError
from torchtune.tokenizers.files import open_tokenizer, tokenizer_from_files, with_tokenizer_json

NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
IN_TEXT = [
    "a<|endoftext|>b",
    "<|a|> <|b|>  <image>",
    "<|user|>hi <tool> x",
    "[INST] hi <0x0A>",
    "a <|im_end|> b",
    "<|begin_of_text|>x",
]


def added(contents, start, **properties):
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {str(start + i): {"content": content} | plain | properties for i, content in enumerate(contents)}


def llama2_json():
    """As older converters wrote it: the space before the first word comes from a normalizer."""
    content, _ = tokenizer_from_files({"tokenizer.model": sentencepiece_model("llama")})
    steps = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    return json.loads(content) | {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}


def json_with_spaces_taken():
    """Its <|im_end|> takes the spaces around it."""
    content = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    for token in content["added_tokens"]:
        token["lstrip"] = token["rstrip"] = token["content"] == "<|im_end|>"
    return content


def llama_class(**options):
    return {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    } | options


LEGACY_FILES = {
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>", "rstrip": True}},
    "added_tokens.json": {"<|a|>": 400, "<|b|>": 401},
}
PHI3_ADDED = added(["<unk>", "<s>", "</s>"], 0) | added(["<|user|>"], 600, rstrip=True) | added(["<tool>"], 601)
RENAMED = added(["<unk>", "<s>", "</s>"], 0) | added(["[INST]"], 300)
# Name: the files beside config.json, and its model type.
FOLDERS = {
    "sentencepiece, class by model type": lambda: ({"tokenizer.model": sentencepiece_model("llama")}, "mistral"),
    "sentencepiece, unigram": lambda: ({"tokenizer.model": sentencepiece_model("unigram")}, "mistral"),
    "sentencepiece, nfkc": lambda: ({"tokenizer.model": sentencepiece_model("bpe with nfkc")}, "mistral"),
    "sentencepiece, Llama's class": lambda: (
        {"tokenizer.model": sentencepiece_model("llama"), "tokenizer_config.json": llama_class(add_bos_token=True)},
        "llama",
    ),
    "sentencepiece, Llama's class, legacy": lambda: (
        {
            "tokenizer.model": sentencepiece_model("llama"),
            "tokenizer_config.json": llama_class(legacy=True, add_bos_token=True, add_eos_token=True),
        },
        "llama",
    ),
    "sentencepiece, Gemma's class": lambda: (
        {
            "tokenizer.model": sentencepiece_model("gemma"),
            "tokenizer_config.json": {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True},
        },
        "gemma",
    ),
    "sentencepiece, added tokens": lambda: (
        {
            "tokenizer.model": sentencepiece_model("llama"),
            "tokenizer_config.json": llama_class(legacy=False, added_tokens_decoder=PHI3_ADDED),
        },
        "phi3",
    ),
    "sentencepiece, a piece renamed": lambda: (
        {
            "tokenizer.model": sentencepiece_model("llama"),
            "tokenizer_config.json": llama_class(added_tokens_decoder=RENAMED),
        },
        "mistral",
    ),
    "tiktoken": lambda: (
        {
            "tokenizer.model": tiktoken_file(tiktoken_ranks()),
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|begin_of_text|>",
                "add_bos_token": True,
                "added_tokens_decoder": added(["<|begin_of_text|>"], len(tiktoken_ranks()) + 3),
            },
        },
        "llama",
    ),
    "vocab and merges, GPT-2": lambda: (
        byte_level_files() | {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}},
        "gpt2",
    ),
    "vocab and merges, no config": lambda: (byte_level_files(), "qwen3"),
    "vocab and merges, GPT-NeoX": lambda: (
        byte_level_files() | {"tokenizer_config.json": {"tokenizer_class": "GPTNeoXTokenizerFast"}},
        "gpt_neox",
    ),
    "vocab and merges, Qwen2": lambda: (
        byte_level_files()
        | {
            "tokenizer_config.json": {
                "tokenizer_class": "Qwen2Tokenizer",
                "bos_token": None,
                "eos_token": "<|endoftext|>",
                "additional_special_tokens": ["<|a|>"],
                "added_tokens_decoder": added(["<|endoftext|>", "<|a|>"], 400) | added(["<tool>"], 402, special=False),
            }
        },
        "qwen2",
    ),
    "vocab and merges, older files": lambda: (
        byte_level_files() | LEGACY_FILES | {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}},
        "gpt2",
    ),
    "tokenizer.json alone": lambda: (
        {"tokenizer.json": tiny_tokenizer().backend_tokenizer.to_str().encode()},
        "llama",
    ),
    "tokenizer.json, tokens declared beside it": lambda: (
        {
            "tokenizer.json": tiny_tokenizer().backend_tokenizer.to_str().encode(),
            "tokenizer_config.json": {
                "bos_token": "<s>",
                "eos_token": "<|b|>",
                "extra_special_tokens": {"image_token": "<image>"},
                "added_tokens_decoder": added(["<|a|>"], 400, lstrip=True),
            },
        },
        "llama",
    ),
    "tokenizer.json, a named token with properties": lambda: (
        {"tokenizer.json": json_with_spaces_taken(), "tokenizer_config.json": {"eos_token": "<|im_end|>"}},
        "llama",
    ),
    "tokenizer.json, older files": lambda: (
        {"tokenizer.json": tiny_tokenizer().backend_tokenizer.to_str().encode()}
        | {"special_tokens_map.json": {"pad_token": "<pad>", "additional_special_tokens": ["<|a|>"]}},
        "mistral",
    ),
    "tokenizer.json, Llama's class": lambda: (
        {"tokenizer.json": llama2_json(), "tokenizer_config.json": llama_class(legacy=False)},
        "llama",
    ),
    "tokenizer.json, Llama's class, legacy": lambda: (
        {"tokenizer.json": llama2_json(), "tokenizer_config.json": llama_class(legacy=True)},
        "llama",
    ),
    "tokenizer.json, Llama's class, which Mistral ignores": lambda: (
        {"tokenizer.json": llama2_json(), "tokenizer_config.json": llama_class(legacy=False)},
        "mistral",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_equal_transformers(name, tmp_path):
    """Also in the folder that is saved, which has a tokenizer.json; BOS, EOS and named tokens too."""
    files, model_type = FOLDERS[name]()
    config = {"model_type": model_type}
    files = write_files(tmp_path / "source", files, config)
    saved = with_tokenizer_json(files, config)
    write_files(tmp_path / "saved", saved, config)
    ours, again = open_tokenizer(files, config), open_tokenizer(saved, config)
    assert ours.special == again.special
    assert ours.added_tokens == again.added_tokens
    for folder in ("source", "saved"):
        theirs = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert {name: ours.special.get(name) for name in NAMES} == {name: getattr(theirs, name) for name in NAMES}
        assert ours.added_tokens == theirs.get_added_vocab()
        for text in [*TEXTS, *SPECIAL_TEXTS, *IN_TEXT, *random_texts(50)]:
            ids = theirs(text)["input_ids"]
            for tokenizer in (ours, again):
                assert tokenizer._fast.encode(text).ids == ids, (folder, text)
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), (folder, text)


def test_a_class_that_would_read_the_saved_file_otherwise_is_replaced(tmp_path):
    """Llama's takes a unigram model's pieces for those of BPE, so the folder that is saved names another."""
    config = {"model_type": "llama"}
    files = {"tokenizer.model": sentencepiece_model("unigram"), "tokenizer_config.json": llama_class()}
    saved = with_tokenizer_json(
        {name: json.dumps(v).encode() if isinstance(v, dict) else v for name, v in files.items()}, config
    )
    write_files(tmp_path / "saved", saved, config)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in TEXTS:
        assert theirs(text)["input_ids"] == open_tokenizer(saved, config).encode(text).ids


def test_ids_that_are_declared_are_kept():
    """The library numbers added tokens by itself; a gap before one would shift it onto another row."""
    config = {"added_tokens_decoder": added(["<|far|>"], 410) | added(["<|near|>"], 400)}
    files = byte_level_files() | {"tokenizer_config.json": json.dumps(config).encode()}
    tokenizer = open_tokenizer(files, {"model_type": "gpt2"})
    assert tokenizer.encode("a<|near|>b<|far|>").ids[1::2] == [400, 410]
    assert {"<|near|>", "<|far|>"} <= set(tokenizer.special_tokens)
    assert tokenizer.token_id("<|endoftext|>") == 411  # GPT-2's class brings it


def test_a_declared_id_that_is_another_token_is_refused():
    """Weights say what an id means; the token and both ids are named."""
    config = {"added_tokens_decoder": added(["<s>"], 7)}
    files = {"tokenizer.json": tiny_tokenizer().backend_tokenizer.to_str().encode()}
    with pytest.raises(CheckpointError, match=r"'<s>'.*7.*0"):
        open_tokenizer(files | {"tokenizer_config.json": json.dumps(config).encode()})


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "none of them"),
        ({"vocab.json": b"{}"}, "vocab.json"),
        ({"tokenizer.json": b"{"}, r"tokenizer\.json"),
        ({"vocab.json": b'{"a": 0}', "merges.txt": b"a b c\n"}, "line 1"),
        ({"vocab.json": b'{"a": 0}', "merges.txt": b"a b\n"}, "make no tokenizer"),
        ({"tokenizer.model": b"YQ== 0\nYg== x\n"}, "line 2"),
        ({"tokenizer.json": b"{}", "tokenizer_config.json": b"[]"}, r"tokenizer_config\.json"),
    ],
)
def test_what_can_not_be_read_is_named(files, said):
    """The file, and where there is one the line."""
    with pytest.raises(CheckpointError, match=said):
        open_tokenizer(files)


def test_a_class_whose_text_splitting_is_unknown_is_refused():
    """Ids would be nearly right."""
    config = json.dumps({"tokenizer_class": "BartTokenizer"}).encode()
    with pytest.raises(UnsupportedError, match="BartTokenizer"):
        open_tokenizer(byte_level_files() | {"tokenizer_config.json": config})


def test_a_checkpoint_with_a_sentencepiece_model_alone(tmp_path):
    """It opens, and what is saved has the original file and a tokenizer.json."""
    write_files(tmp_path / "source", {"tokenizer.model": sentencepiece_model("llama")}, {"model_type": "llama"})
    checkpoint = open_checkpoint(tmp_path / "source", weights=False)
    assert {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"} <= set(checkpoint.files)
    assert checkpoint.tokenizer().encode("hello").ids == open_tokenizer(checkpoint.files).encode("hello").ids
    assert checkpoint.tokenizer().bos_token == "<s>"


@pytest.mark.parametrize("named", ["tokenizer.model", "x.tiktoken", "other.json"])
def test_a_tokenizer_file_named_by_its_path(named, tmp_path):
    """That one is read, whatever else lies beside it."""
    contents = {
        "tokenizer.model": sentencepiece_model("llama"),
        "x.tiktoken": tiktoken_file(tiktoken_ranks()),
        "other.json": llama2_json(),
    }
    others = {"tokenizer.json": tiny_tokenizer().backend_tokenizer.to_str().encode(), "y.tiktoken": b"YQ== 0\n"}
    write_files(tmp_path / "all", others | contents, {"model_type": "mistral"})
    under = {"tokenizer.model": "tokenizer.model", "x.tiktoken": "x.tiktoken", "other.json": "tokenizer.json"}[named]
    alone = write_files(tmp_path / "alone", {under: contents[named]}, {"model_type": "mistral"})
    opened = open_tokenizer(open_tokenizer_files(tmp_path / "all" / named))
    for text in TEXTS:
        assert opened.encode(text).ids == open_tokenizer(alone).encode(text).ids
