"""Mistral against transformers."""

import pytest
from transformers import MistralConfig

from tests.models.oracle import HEADS, SIZES, check_family


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": None},
        {"sliding_window": 7},
        {"head_dim": 16, "tie_word_embeddings": True, "sliding_window": None},
    ],
)
def test_equals_transformers(tmp_path, changes):
    """Windows, head sizes of their own, tied embeddings."""
    check_family(tmp_path, MistralConfig(**SIZES | HEADS | changes))
