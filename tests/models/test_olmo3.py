"""OLMo 3 against transformers: a window and a rotation for each kind of layer."""

import pytest
from transformers import Olmo3Config

from tests.models.oracle import HEADS, SIZES, check_family, check_other_spelling
from torchtune.errors import UnsupportedError
from torchtune.models.build import build_model

BASE = SIZES | HEADS | {"pad_token_id": 0, "max_position_embeddings": 128, "sliding_window": 5, "num_hidden_layers": 4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
PLAIN = {"rope_type": "default", "rope_theta": 7e3}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_hidden_layers": 5, "num_key_value_heads": None, "tie_word_embeddings": True},
        {"attention_bias": True, "rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN}},
        {
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "num_hidden_layers": 3,
            "head_dim": 12,
            "rope_parameters": {"full_attention": PLAIN, "sliding_attention": YARN},
        },
        {"layer_types": ["sliding_attention"] * 2, "num_hidden_layers": 2, "sliding_window": 2},
        {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2, "hidden_act": "gelu_new"},
    ],
)
def test_equals_transformers(tmp_path, changes):
    """The window on three layers of four or as listed, each kind turned by its own frequencies."""
    check_family(tmp_path, Olmo3Config(**BASE | changes))


@pytest.mark.parametrize("scaling", [None, {key: value for key, value in YARN.items() if key != "rope_theta"}])
@pytest.mark.parametrize("theta", [{"rope_theta": 5e5}, {"rope_theta": 8e3}, {}])
def test_config_of_the_first_release(tmp_path, scaling, theta):
    """`rope_theta` and `rope_scaling` are those of the layers that see all, the windows by the fourth layer."""
    left_out = ["rope_parameters", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "layer_types"]
    check_other_spelling(tmp_path, Olmo3Config(**BASE), {"rope_scaling": scaling} | theta, without=left_out)


def test_a_flat_rope_is_refused():
    """One set of options for all layers could mean either kind."""
    with pytest.raises(UnsupportedError, match="stand under 'full_attention' and 'sliding_attention'"):
        build_model({"model_type": "olmo3", "rope_parameters": YARN} | BASE)
