"""Llama against transformers: heads, biases, ties, and every kind of rotary embedding."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from tests.models.oracle import HEADS, SIZES, check_against_transformers, check_family, check_packed

CASES = Path(__file__).parent.parent / "cases"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": 40,
    "factor": 4.0,
    "rope_theta": 10000.0,
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
        {"head_dim": 12, "hidden_act": "gelu"},
        {"rope_parameters": LLAMA3, "max_position_embeddings": 128},
        {"rope_parameters": YARN, "max_position_embeddings": 64},
        {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 16, "truncate": False}},
        {"rope_parameters": LINEAR},
        {"rope_parameters": DYNAMIC, "max_position_embeddings": 40},
        {"rope_parameters": LONGROPE, "max_position_embeddings": 160},
        json.loads((CASES / "C070_config.json").read_text()),
    ],
)
def test_equals_transformers(tmp_path, changes):
    """Logits, gradients, packed and cached forms, and what is written."""
    check_family(tmp_path, LlamaConfig(**SIZES | HEADS | {"max_position_embeddings": 256} | changes))


@pytest.mark.parametrize("rope", [DYNAMIC, LONGROPE | {"original_max_position_embeddings": 16}])
def test_rotary_beyond_the_original_context(tmp_path, rope):
    """Kinds that stretch long documents: each document by its own length, short and long in one pack."""
    config = LlamaConfig(**SIZES | HEADS | {"rope_parameters": rope, "max_position_embeddings": 12})
    check_packed(check_against_transformers(tmp_path, config))
