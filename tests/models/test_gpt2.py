"""GPT-2 against transformers: learnt positions, weights as [in, out], names and masks of old files."""

import json

import pytest
import torch
from transformers import GPT2Config

from tests.models.oracle import check_family, check_other_spelling, check_rewritten, save_random
from torchtune.checkpoint.load import load_model
from torchtune.errors import UnsupportedError
from torchtune.models.build import build_model
from torchtune.models.config import context_length

BASE = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_head": 2, "n_inner": 37, "activation_function": "gelu", "tie_word_embeddings": False},
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 1e-3},
        {"n_embd": 30, "n_head": 1, "reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    ],
)
def test_equals_transformers(tmp_path, changes):
    """Logits, gradients, packed and cached forms, and what is written."""
    check_family(tmp_path, GPT2Config(**BASE | changes))


def test_config_of_the_hub(tmp_path):
    """It leaves out what is a default, and has keys of its own."""
    left_out = "n_inner scale_attn_weights scale_attn_by_inverse_layer_idx reorder_and_upcast_attn tie_word_embeddings"
    check_other_spelling(tmp_path, GPT2Config(**BASE), {"n_ctx": 40}, without=left_out.split())


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("has_masks", [True, False])
def test_old_files(tmp_path, prefix, has_masks):
    """Names without `transformer.` and masks of attention stay as they are."""

    def rewrite(tensors):
        renamed = {prefix + name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        masks = {f"{prefix}h.{index}.attn.bias": torch.ones(1, 1, 40, 40).tril() for index in range(3)}
        return renamed | masks if has_masks else renamed

    check_rewritten(tmp_path, GPT2Config(**BASE), rewrite)
    names = load_model(tmp_path / "source").state_dict()
    assert f"{prefix}h.2.attn.c_attn.weight" in names


def test_more_positions_than_were_learnt_are_refused(tmp_path):
    """By name, in training and in decoding, and by the length that the data may have."""
    save_random(tmp_path, GPT2Config(**BASE))
    model = load_model(tmp_path)
    assert model(torch.zeros(1, 40, dtype=torch.int64)).shape == (1, 40, 97)
    with pytest.raises(ValueError, match="document 0 has 41 tokens, and the model has learnt 40 positions"):
        model(torch.zeros(1, 41, dtype=torch.int64))
    cache = model.empty_cache()
    model(torch.zeros(1, 40, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="40 positions"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
    assert context_length(json.loads((tmp_path / "config.json").read_text())) == 40


def test_cross_attention_is_refused():
    """It is an encoder's decoder then, no language model."""
    with pytest.raises(UnsupportedError, match="add_cross_attention"):
        build_model({"model_type": "gpt2", "add_cross_attention": True} | BASE)
