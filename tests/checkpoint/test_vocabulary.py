"""New tokens: tokenizer, embedding, head and config grow together, and transformers loads what is saved."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.models.auto import AutoModelForCausalLM

from tests.tiny_checkpoint import VOCAB_SIZE, save_tiny_checkpoint, tiny_config
from torchtune.checkpoint.open import open_checkpoint
from torchtune.checkpoint.save import save_model
from torchtune.checkpoint.vocabulary import grow_vocabulary
from torchtune.errors import TuneError
from torchtune.models.build import build_model

NEW = ["<think>", "</think>"]


def grown_and_saved(source, target, new_tokens, multiple=None):
    checkpoint = grow_vocabulary(open_checkpoint(source), new_tokens, pad_to_multiple_of=multiple)
    with torch.device("meta"):
        model = build_model(checkpoint.config)
    checkpoint.load_into(model)
    checkpoint.check(model, checkpoint.tokenizer())
    save_model(target, model, checkpoint)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("multiple", [None, 64])
def test_new_tokens_are_in_tokenizer_weights_and_config(tmp_path, tied, multiple):
    """Each is one id in both libraries; its rows are the mean of all known ones; the old rows are untouched."""
    source = save_tiny_checkpoint(tmp_path / "source", tiny_config(tie_word_embeddings=tied))
    num_known = open_checkpoint(source).tokenizer().vocab_size
    grown_and_saved(source, tmp_path / "grown", NEW, multiple)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "grown", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "grown")
    ids = tokenizer("a<think>b</think>", add_special_tokens=False)["input_ids"]
    assert ids[1::2] == [tokenizer.convert_tokens_to_ids(token) for token in NEW] == [num_known, num_known + 1]
    assert open_checkpoint(tmp_path / "grown").tokenizer().encode("a<think>b</think>").ids == ids
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "grown"))
    assert before.keys() == after.keys()
    num_rows = max(VOCAB_SIZE, num_known + 2)
    num_rows = -(-num_rows // multiple) * multiple if multiple else num_rows
    for name in ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"]):
        assert len(after[name]) == num_rows
        assert torch.equal(after[name][:num_known], before[name][:num_known])
        mean = before[name][:num_known].double().mean(0).float()
        torch.testing.assert_close(after[name][num_known : num_known + 2], mean.expand(2, -1))
    assert (
        theirs.config.vocab_size
        == num_rows
        == json.loads((tmp_path / "grown" / "config.json").read_text())["vocab_size"]
    )


def test_rows_are_added_for_ids_that_have_none_on_request(tmp_path):
    """C063: a tokenizer with more ids than the embedding has rows is usable once rows are asked for."""
    source = save_tiny_checkpoint(tmp_path / "source")
    path = source / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    for index in range(VOCAB_SIZE, VOCAB_SIZE + 5):
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": index, "content": f"<extra{index}>"})
    path.write_text(json.dumps(tokenizer))
    model = grown_and_saved(source, tmp_path / "grown", [], 8)
    assert model.model.embed_tokens.num_embeddings == 408
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "grown").config.vocab_size == 408


@pytest.mark.parametrize("token", ["<s>", "", " <new> "])
def test_what_is_no_new_token_is_refused_by_name(tmp_path, token):
    """One that is there already, an empty one, one whose spaces a tokenizer would strip."""
    source = save_tiny_checkpoint(tmp_path / "source")
    with pytest.raises(TuneError) as caught:
        grow_vocabulary(open_checkpoint(source), [token])
    assert repr(token) in str(caught.value) or f"'{token}'" in str(caught.value)
