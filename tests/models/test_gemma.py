"""Gemma against transformers."""

import pytest
from transformers import GemmaConfig

from tests.models.oracle import HEADS, SIZES, check_family, check_other_spelling

BASE = SIZES | HEADS | {"head_dim": 8}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_dim": 14, "num_key_value_heads": 1, "rms_norm_eps": 1e-2},
        {"num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": False, "hidden_act": "silu"},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e3}, "max_position_embeddings": 64},
    ],
)
def test_equals_transformers(tmp_path, changes):
    """Norms from one, scaled embeddings, head sizes of their own, ties and biases."""
    check_family(tmp_path, GemmaConfig(**BASE | changes))


def test_config_of_the_first_release(tmp_path):
    """It says "gelu" and means its tanh form; the rotary base stands at the top."""
    left_out = ("rope_parameters", "rms_norm_eps", "tie_word_embeddings", "attention_bias")
    changes = {"hidden_act": "gelu", "rope_theta": 2e3}
    check_other_spelling(tmp_path, GemmaConfig(**BASE), changes, without=left_out)
