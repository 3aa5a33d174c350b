"""Ministral against transformers."""

import pytest
from transformers import MinistralConfig

from tests.models.oracle import HEADS, SIZES, check_family

BASE = SIZES | HEADS | {"head_dim": 8, "sliding_window": 6}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "tie_word_embeddings": True},
        {"layer_types": ["full_attention"] * 3, "head_dim": 14, "num_key_value_heads": 4},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}, "num_key_value_heads": 1},
    ],
)
def test_equals_transformers(tmp_path, changes):
    """Windows on all layers, on some, on none; head sizes of their own."""
    check_family(tmp_path, MinistralConfig(**BASE | changes))
