"""GLM and GLM-4-0414 against transformers: neighbouring pairs turned in a part of each head, fused gates."""

import pytest
from transformers import Glm4Config, GlmConfig

from tests.models.oracle import HEADS, SIZES, check_family, check_other_spelling

BASE = SIZES | HEADS | {"pad_token_id": 0, "max_position_embeddings": 128, "head_dim": 8}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}


@pytest.mark.parametrize("kind", [GlmConfig, Glm4Config])
@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 12, "num_key_value_heads": 4, "tie_word_embeddings": True},
        {"attention_bias": False, "num_key_value_heads": 1, "hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7e3, "partial_rotary_factor": 1.0}},
        {"rope_parameters": YARN | {"partial_rotary_factor": 0.75}, "num_hidden_layers": 2, "intermediate_size": 37},
    ],
)
def test_equals_transformers(tmp_path, kind, changes):
    """Logits, gradients, packed and cached forms, and what is written; 6 of 12 dims are turned by default."""
    check_family(tmp_path, kind(**BASE | changes))


@pytest.mark.parametrize("kind", [GlmConfig, Glm4Config])
@pytest.mark.parametrize("partial", [{}, {"partial_rotary_factor": 0.25}])
def test_config_of_the_first_release(tmp_path, kind, partial):
    """`rope_theta` and `partial_rotary_factor` beside the other keys, defaults left out."""
    left_out = ["rope_parameters", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "head_dim", "hidden_act"]
    sizes = {"head_dim": 128, "num_hidden_layers": 2}
    changes = {"rope_theta": 5e3, "rope_scaling": None} | partial
    check_other_spelling(tmp_path, kind(**BASE | sizes), changes, without=left_out)
