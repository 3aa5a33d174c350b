"""Cohere against transformers."""

import pytest
from transformers import CohereConfig

from tests.models.oracle import HEADS, SIZES, check_family, check_other_spelling

BASE = SIZES | HEADS


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_qk_norm": True, "tie_word_embeddings": False, "logit_scale": 0.3},
        {"use_qk_norm": True, "num_key_value_heads": 4, "attention_bias": True, "layer_norm_eps": 1e-2},
        {"num_key_value_heads": None, "hidden_act": "gelu", "head_dim": 12},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 8e4}, "num_key_value_heads": 1},
    ],
)
def test_equals_transformers(tmp_path, changes):
    """One norm a layer, pairs of neighbours turned, norms of all heads at once, scaled logits."""
    check_family(tmp_path, CohereConfig(**BASE | changes))


def test_config_of_the_first_release(tmp_path):
    """The rotary base at the top; no ties, norms or biases mentioned."""
    left_out = ("rope_parameters", "tie_word_embeddings", "use_qk_norm", "attention_bias", "logit_scale")
    check_other_spelling(tmp_path, CohereConfig(**BASE), {"rope_theta": 8e6}, without=left_out)


def test_default_rotary_base(tmp_path):
    """Half a million, where no key says it."""
    check_other_spelling(tmp_path, CohereConfig(**BASE), {}, without=["rope_parameters"])
