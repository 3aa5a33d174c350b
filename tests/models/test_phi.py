"""Phi against transformers: blocks side by side, a bias on every projection and on the head."""

import pytest
import torch
from transformers import PhiConfig

from tests.models.oracle import HEADS, SIZES, check_family, check_other_spelling, save_random
from torchtune.checkpoint.load import load_model
from torchtune.errors import UnsupportedError
from torchtune.models.build import build_model

BASE = SIZES | HEADS | {"pad_token_id": 0, "max_position_embeddings": 128}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": None, "qk_layernorm": True, "hidden_act": "gelu"},
        {"num_key_value_heads": 1, "rope_parameters": YARN | {"partial_rotary_factor": 1.0}, "layer_norm_eps": 1e-3},
        {"head_dim": 12, "intermediate_size": 37, "num_hidden_layers": 2},
    ],
)
def test_equals_transformers(tmp_path, changes):
    """Logits, gradients, packed and cached forms, and what is written; half of each head is turned by default."""
    check_family(tmp_path, PhiConfig(**BASE | changes))


@pytest.mark.parametrize("changes", [{}, {"rope_theta": 5e3, "partial_rotary_factor": 0.25, "rope_scaling": None}])
def test_config_of_the_first_release(tmp_path, changes):
    """`partial_rotary_factor` and `rope_theta` beside the other keys, defaults left out."""
    left_out = ["rope_parameters", "layer_norm_eps", "tie_word_embeddings", "hidden_act", "qk_layernorm"]
    check_other_spelling(tmp_path, PhiConfig(**BASE), changes, without=left_out)


def test_the_bias_of_the_head_is_a_row_of_the_vocabulary(tmp_path):
    """What grows the vocabulary grows it too, and its gradient is in the loss."""
    save_random(tmp_path, PhiConfig(**BASE))
    model = load_model(tmp_path)
    assert model.vocabulary_parameters == ["model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"]
    ids = torch.arange(10)[None]
    model(ids, labels=ids).backward()
    expected = (model(ids)[0].softmax(-1) - torch.nn.functional.one_hot(ids[0], 97)).sum(0)
    torch.testing.assert_close(model.lm_head.bias.grad, expected.detach())


def test_a_tied_head_is_refused():
    """It would own its bias alone."""
    with pytest.raises(UnsupportedError, match="tie_word_embeddings"):
        build_model({"model_type": "phi", "tie_word_embeddings": True} | BASE)
