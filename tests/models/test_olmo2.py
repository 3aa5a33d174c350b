"""OLMo 2 against transformers."""

import pytest
from transformers import Olmo2Config

from tests.models.oracle import HEADS, SIZES, check_family, check_other_spelling

BASE = SIZES | HEADS | {"pad_token_id": 0, "max_position_embeddings": 128}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": None, "attention_bias": True, "tie_word_embeddings": True},
        {"num_key_value_heads": 1, "head_dim": 12, "hidden_act": "gelu", "intermediate_size": 37},
        {"rope_parameters": YARN, "rms_norm_eps": 1e-3},
    ],
)
def test_equals_transformers(tmp_path, changes):
    """Norms over all heads at once and after each block; heads, biases, ties and rotation as in Llama."""
    check_family(tmp_path, Olmo2Config(**BASE | changes))


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 4.0}, {"type": "dynamic", "factor": 4.0}])
def test_config_of_the_first_release(tmp_path, scaling):
    """`rope_theta` and `rope_scaling` beside the other keys, defaults left out."""
    left_out = ["rope_parameters", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "hidden_act"]
    changes = {"rope_theta": 5e5, "rope_scaling": scaling, "max_position_embeddings": 20}
    check_other_spelling(tmp_path, Olmo2Config(**BASE), changes, without=left_out)
