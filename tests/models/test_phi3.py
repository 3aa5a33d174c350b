"""Phi-3 against transformers: fused matrices, windows, partial rotation, and longrope on both sides of its bound."""

import pytest
from transformers import Phi3Config

from tests.models.oracle import (
    HEADS,
    SIZES,
    check_against_transformers,
    check_family,
    check_other_spelling,
    check_packed,
    check_round_trip,
)

BASE = SIZES | HEADS | {"pad_token_id": 0, "max_position_embeddings": 128}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [3.0, 4.0, 5.0, 6.0],
}
PARTIAL = LONGROPE | {"partial_rotary_factor": 0.75, "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.5, 4.0, 9.0]}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": None, "tie_word_embeddings": True, "hidden_act": "gelu"},
        {"num_key_value_heads": 1, "sliding_window": 5, "rope_parameters": {"rope_type": "default", "rope_theta": 7e3}},
        {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_type": "default", "rope_theta": 1e4}},
        {"head_dim": 12, "num_hidden_layers": 2, "intermediate_size": 37},
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 40},
        {"rope_parameters": PARTIAL, "original_max_position_embeddings": 64, "tie_word_embeddings": True},
    ],
)
def test_equals_transformers(tmp_path, changes):
    """Logits, gradients, packed and cached forms, and what is written."""
    check_family(tmp_path, Phi3Config(**BASE | changes))


@pytest.mark.parametrize("rope", [LONGROPE, PARTIAL | {"attention_factor": 1.7}, LONGROPE | {"factor": 3.0}])
def test_beyond_the_original_context(tmp_path, rope):
    """Long frequencies for long documents, in one pack with short ones that keep theirs (9, 1 and 14 tokens)."""
    config = Phi3Config(**BASE | {"rope_parameters": rope, "original_max_position_embeddings": 12})
    check_packed(check_against_transformers(tmp_path, config))
    check_round_trip(tmp_path, config)


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
@pytest.mark.parametrize("original", [12, 40])
def test_config_of_the_first_release(tmp_path, name, original):
    """`rope_scaling` with a `type`, and `rope_theta` beside it; longrope under its older names."""
    scaling = {"type": name, "short_factor": LONGROPE["short_factor"], "long_factor": LONGROPE["long_factor"]}
    if name != "longrope":  # transformers reads the older names only where this stands here too
        scaling["original_max_position_embeddings"] = original
    changes = {"rope_scaling": scaling, "rope_theta": 5e3, "original_max_position_embeddings": original}
    check_other_spelling(
        tmp_path,
        Phi3Config(**BASE),
        changes,
        without=["rope_parameters", "rms_norm_eps", "tie_word_embeddings", "sliding_window", "attention_dropout"],
    )


def test_config_of_phi_4_mini(tmp_path):
    """A part of each head is turned, said beside `rope_scaling`; the original context stands in both places."""
    scaling = {"type": "longrope", "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.5, 4.0, 9.0]}
    changes = {
        "rope_scaling": scaling,
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 12,
        "tie_word_embeddings": True,
    }
    check_other_spelling(tmp_path, Phi3Config(**BASE, tie_word_embeddings=True), changes, without=["rope_parameters"])
