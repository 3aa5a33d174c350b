"""GLM-4.5 against transformers."""

import pytest
from transformers import Glm4MoeConfig

from tests.models.oracle import HEADS, SIZES, check_family, check_other_spelling

SMALL = (
    SIZES
    | HEADS
    | {
        "head_dim": 16,
        "moe_intermediate_size": 24,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_qk_norm": True, "attention_bias": True, "n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5},
        {"first_k_dense_replace": 0, "norm_topk_prob": False, "n_shared_experts": 2, "tie_word_embeddings": True},
    ],
)
def test_equals_transformers(tmp_path, changes):
    """Half of each head rotated, norms on heads, biases, experts by group, dense layers."""
    check_family(tmp_path, Glm4MoeConfig(**SMALL | changes))


@pytest.mark.parametrize("factor", [{}, {"partial_rotary_factor": 0.25}])
def test_equals_transformers_where_the_config_is_of_the_release(tmp_path, factor):
    """The base and the rotated part at the top level, or the part left to its default."""
    changes = {"rope_theta": 1_000_000, "rope_scaling": None} | factor
    check_other_spelling(tmp_path, Glm4MoeConfig(**SMALL), changes, without=["rope_parameters"])
