"""gpt-oss against transformers."""

import pytest
from transformers import GptOssConfig

from tests.models.oracle import HEADS, SIZES, check_family, check_other_spelling, check_router_loss

EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 6}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "tie_word_embeddings": True, "head_dim": 12},
        {"rope_parameters": YARN | {"rope_theta": 150.0}, "swiglu_limit": 0.7, "swiglu_alpha": 1.1},
        {"attention_bias": False, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    ],
)
def test_equals_transformers(tmp_path, changes):
    """Sinks, windows, yarn without truncation, limits that hold values, biases on and off."""
    check_family(tmp_path, GptOssConfig(**SIZES | HEADS | EXPERTS | changes))


def test_equals_transformers_where_the_config_is_of_the_release(tmp_path):
    """`rope_scaling` and a base at the top level; layer types left out, their default alternates."""
    old = {"rope_scaling": YARN | {"beta_fast": 32.0, "beta_slow": 1.0}, "rope_theta": 150000, "model_type": "gpt_oss"}
    config = GptOssConfig(**SIZES | HEADS | EXPERTS)
    check_other_spelling(tmp_path, config, old, without=["rope_parameters", "layer_types", "attention_bias"])


def test_trains_with_the_load_balancing_loss(tmp_path):
    """As transformers does where the config asks for it."""
    balanced = {"output_router_logits": True, "router_aux_loss_coef": 0.3}
    check_router_loss(tmp_path, GptOssConfig(**SIZES | HEADS | EXPERTS | balanced))
