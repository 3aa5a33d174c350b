"""StarCoder2 against transformers."""

import pytest
from transformers import Starcoder2Config

from tests.models.oracle import HEADS, SIZES, check_family, check_other_spelling

BASE = SIZES | HEADS


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_bias": False, "tie_word_embeddings": False, "num_key_value_heads": 4},
        {"sliding_window": 6, "num_key_value_heads": 1, "norm_epsilon": 1e-2},
        {"hidden_act": "relu2", "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5}},
    ],
)
def test_equals_transformers(tmp_path, changes):
    """Biases on and off, windows, ties, activations."""
    check_family(tmp_path, Starcoder2Config(**BASE | changes))


def test_config_of_the_first_release(tmp_path, caplog):
    """The rotary base at the top, dropout (left off, and said), biases and ties by default."""
    left_out = ("rope_parameters", "tie_word_embeddings", "use_bias")
    changes = {"rope_theta": 1e5, "residual_dropout": 0.1, "mlp_type": "default", "sliding_window": 7}
    check_other_spelling(tmp_path, Starcoder2Config(**BASE), changes, without=left_out)
    assert "residual_dropout: 0.1 is not applied" in caplog.text
