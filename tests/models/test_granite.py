"""Granite against transformers."""

import pytest
from transformers import GraniteConfig

from tests.models.oracle import HEADS, SIZES, check_family, check_other_spelling

MULTIPLIERS = {
    "embedding_multiplier": 12,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}
BASE = SIZES | HEADS | MULTIPLIERS


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": None},
        {"tie_word_embeddings": True, "num_key_value_heads": 1, "residual_multiplier": 1.7, "hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}, "max_position_embeddings": 64},
        dict.fromkeys(MULTIPLIERS, 1.0),
    ],
)
def test_equals_transformers(tmp_path, changes):
    """Each multiplier, ties and biases on and off."""
    check_family(tmp_path, GraniteConfig(**BASE | changes))


def test_config_of_the_first_release(tmp_path):
    """Older rotary keys; a multiplier that is not there is one."""
    left_out = ("rope_parameters", "attention_multiplier", "tie_word_embeddings", "mlp_bias", "attention_bias")
    changes = {"rope_theta": 5e3, "rope_scaling": {"type": "linear", "factor": 2.0}}
    check_other_spelling(tmp_path, GraniteConfig(**BASE), changes, without=left_out)
