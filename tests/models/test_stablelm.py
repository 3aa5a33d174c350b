"""StableLM against transformers."""

import pytest
from transformers import StableLmConfig

from tests.models.oracle import HEADS, SIZES, check_family, check_other_spelling

BASE = SIZES | HEADS


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_layernorm": True, "use_parallel_residual": True, "partial_rotary_factor": 0.5},
        {"qk_layernorm": True, "num_key_value_heads": 1, "use_qkv_bias": True, "layer_norm_eps": 1e-2},
        {"use_parallel_residual": True, "tie_word_embeddings": True, "num_key_value_heads": 4},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e3}, "partial_rotary_factor": 1.0},
    ],
)
def test_equals_transformers(tmp_path, changes):
    """A norm for each head, blocks side by side or in turn, a part of each head turned."""
    check_family(tmp_path, StableLmConfig(**BASE | changes))


@pytest.mark.parametrize("share", [{}, {"partial_rotary_factor": 0.75}])
def test_config_of_the_first_release(tmp_path, share):
    """Base and turned share at the top; a quarter where no key says it."""
    left_out = ("rope_parameters", "qk_layernorm", "use_parallel_residual", "tie_word_embeddings")
    check_other_spelling(tmp_path, StableLmConfig(**BASE), {"rope_theta": 5e3} | share, without=left_out)
