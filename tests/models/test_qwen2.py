"""Qwen2 against transformers."""

import json
from pathlib import Path

import pytest
from transformers import Qwen2Config

from tests.models.oracle import HEADS, SIZES, check_family

C069 = json.loads((Path(__file__).parent.parent / "cases" / "C069_configs.json").read_text())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "num_key_value_heads": 4},
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        *C069.values(),
    ],
)
def test_equals_transformers(tmp_path, changes):
    """Biases on queries, keys and values; windows on the upper layers, only when they are asked for (C069)."""
    check_family(tmp_path, Qwen2Config(**SIZES | HEADS | changes))
