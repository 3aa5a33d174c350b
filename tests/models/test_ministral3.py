"""Ministral 3 against transformers."""

import pytest
from transformers import Ministral3Config

from tests.models.oracle import HEADS, SIZES, check_family, check_other_spelling

BASE = SIZES | HEADS | {"head_dim": 8}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 7,
    "rope_theta": 1e4,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.3,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_parameters": YARN, "tie_word_embeddings": True, "num_key_value_heads": 4},
        {"rope_parameters": YARN | {"rope_type": "default"}, "sliding_window": 6, "num_key_value_heads": 1},
    ],
)
def test_equals_transformers(tmp_path, changes):
    """Queries that grow beyond the original context, in every document from its own beginning; windows."""
    check_family(tmp_path, Ministral3Config(**BASE | changes))


def test_rotary_by_default(tmp_path):
    """Yarn from 16,384 positions on, where the config says nothing."""
    check_other_spelling(tmp_path, Ministral3Config(**BASE), {}, without=["rope_parameters", "sliding_window"])
