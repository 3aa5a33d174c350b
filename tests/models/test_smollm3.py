"""SmolLM3 against transformers."""

import pytest
from transformers import SmolLM3Config

from tests.models.oracle import HEADS, SIZES, check_family, check_other_spelling

BASE = SIZES | HEADS | {"num_hidden_layers": 5, "pad_token_id": None}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"no_rope_layers": [0, 1, 1, 0, 1, 1, 1], "tie_word_embeddings": False, "num_key_value_heads": 4},
        {"no_rope_layer_interval": 2, "mlp_bias": True, "num_key_value_heads": 1},
        {"attention_bias": True, "num_hidden_layers": 3},  # without positions a key's bias changes nothing
        {"no_rope_layer_interval": 3, "use_sliding_window": True, "sliding_window": 5},
        {"layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2}
        | {"use_sliding_window": True, "sliding_window": 4},
        {"rope_parameters": YARN, "head_dim": 12},
    ],
)
def test_equals_transformers(tmp_path, changes):
    """Layers without positions by list or interval; windows, where asked for, on those."""
    check_family(tmp_path, SmolLM3Config(**BASE | changes))


def test_config_with_keys_left_out(tmp_path):
    """The interval's, the base's and the ties' defaults."""
    left_out = ("no_rope_layers", "no_rope_layer_interval", "layer_types", "rope_parameters", "tie_word_embeddings")
    check_other_spelling(tmp_path, SmolLM3Config(**BASE), {}, without=left_out)


def test_windows_where_no_list_says_them(tmp_path):
    """They are on the layers without positions."""
    config = SmolLM3Config(**BASE, use_sliding_window=True, sliding_window=5, no_rope_layer_interval=2)
    check_other_spelling(tmp_path, config, {}, without=["layer_types"])


def test_config_of_the_first_release(tmp_path):
    """The rotary base at the top, stretched by the older key."""
    changes = {"rope_theta": 5e4, "rope_scaling": YARN | {"rope_theta": 5e4}}
    check_other_spelling(tmp_path, SmolLM3Config(**BASE), changes, without=["rope_parameters"])
