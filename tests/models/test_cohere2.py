"""Cohere 2 against transformers."""

import pytest
from transformers import Cohere2Config

from tests.models.oracle import HEADS, SIZES, check_family, check_other_spelling
from torchtune.errors import UnsupportedError
from torchtune.models.build import build_model

BASE = SIZES | HEADS | {"num_hidden_layers": 5, "sliding_window": 6}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": None, "tie_word_embeddings": False},
        {"attention_bias": True, "num_hidden_layers": 3},  # without positions a key's bias changes nothing
        {"layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2, "logit_scale": 0.5},
        {"sliding_window_pattern": 2, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e3}},
    ],
)
def test_equals_transformers(tmp_path, changes):
    """Layers with a window know positions, those that see all know none; by pattern or by list."""
    check_family(tmp_path, Cohere2Config(**BASE | changes))


def test_config_of_the_first_release(tmp_path):
    """A pattern instead of a list, the rotary base at the top, keys of its own software beside."""
    changes = {"sliding_window_pattern": 3, "rope_theta": 5e4, "rotary_pct": 1.0, "use_gated_activation": True}
    left_out = ("layer_types", "rope_parameters", "tie_word_embeddings", "attention_bias")
    check_other_spelling(tmp_path, Cohere2Config(**BASE), changes, without=left_out)


def test_an_unknown_kind_of_layer_is_refused():
    """It names the kind and those that there are."""
    config = {"model_type": "cohere2", "layer_types": ["linear_attention"] * 5} | BASE
    with pytest.raises(UnsupportedError, match="layer_types: .*linear_attention.* 5 of 'full_attention'"):
        build_model(config)
