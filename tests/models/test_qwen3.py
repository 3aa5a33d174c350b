"""Qwen3 against transformers."""

import pytest
from transformers import Qwen3Config

from tests.models.oracle import HEADS, SIZES, check_family


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 16},
        {"head_dim": 8, "tie_word_embeddings": True},
        {
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 2,
        },
    ],
)
def test_equals_transformers(tmp_path, changes):
    """A norm on each query and key head, head sizes of their own, windows."""
    check_family(tmp_path, Qwen3Config(**SIZES | HEADS | changes))
