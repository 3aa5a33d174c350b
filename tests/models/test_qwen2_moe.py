"""Qwen2's mixture of experts against transformers."""

import pytest
from transformers import Qwen2MoeConfig

from tests.models.oracle import HEADS, SIZES, check_family, check_other_spelling, check_router_loss

EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        WINDOWS | {"norm_topk_prob": True, "decoder_sparse_step": 2, "tie_word_embeddings": True},
        WINDOWS | {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "qkv_bias": False},
        {"mlp_only_layers": [1], "num_key_value_heads": 4, "num_experts_per_tok": 1},
    ],
)
def test_equals_transformers(tmp_path, changes):
    """The shared expert's gate, windows by pattern and by list, layers without experts, biases on and off."""
    check_family(tmp_path, Qwen2MoeConfig(**SIZES | HEADS | EXPERTS | changes))


def test_equals_transformers_where_the_config_is_of_the_release(tmp_path):
    """The base of rotary at the top level, a window that is not used, and no layer types."""
    changes = {"rope_theta": 1e6, "sliding_window": 5, "max_window_layers": 1, "use_sliding_window": False}
    without = ["rope_parameters", "layer_types", "qkv_bias", "mlp_only_layers"]
    check_other_spelling(tmp_path, Qwen2MoeConfig(**SIZES | HEADS | EXPERTS), changes, without=without)


def test_trains_with_the_load_balancing_loss(tmp_path):
    """As transformers does where the config asks for it."""
    balanced = {"output_router_logits": True, "router_aux_loss_coef": 0.3}
    check_router_loss(tmp_path, Qwen2MoeConfig(**SIZES | HEADS | EXPERTS | balanced))
