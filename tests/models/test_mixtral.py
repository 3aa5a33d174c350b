"""Mixtral against transformers."""

import pytest
from transformers import MixtralConfig

from tests.models.oracle import HEADS, SIZES, check_family, check_other_spelling, check_router_loss


@pytest.mark.parametrize(
    "changes",
    [
        {"num_local_experts": 4},
        {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 7, "tie_word_embeddings": True},
        {"num_local_experts": 3, "head_dim": 16, "num_key_value_heads": 4},
    ],
)
def test_equals_transformers(tmp_path, changes):
    """Experts a token, windows, head sizes of their own, tied embeddings."""
    check_family(tmp_path, MixtralConfig(**SIZES | HEADS | changes))


def test_trains_with_the_load_balancing_loss(tmp_path):
    """As transformers does where the config asks for it."""
    balanced = {"output_router_logits": True, "router_aux_loss_coef": 0.3}
    check_router_loss(tmp_path, MixtralConfig(**SIZES | HEADS | balanced | {"num_local_experts": 4}))


@pytest.mark.parametrize("theta", [{"rope_theta": 1e4}, {}])
def test_equals_transformers_where_the_config_is_of_the_release(tmp_path, theta):
    """The base of rotary at the top level, or left to its default; experts left to theirs."""
    config = MixtralConfig(**SIZES | HEADS | {"num_local_experts": 8})
    without = ["rope_parameters", "num_local_experts", "num_experts_per_tok", "head_dim", "sliding_window"]
    check_other_spelling(tmp_path, config, theta, without=without)
