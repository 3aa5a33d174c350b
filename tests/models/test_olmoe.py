"""OLMoE against transformers."""

import pytest
from transformers import OlmoeConfig

from tests.models.oracle import HEADS, SIZES, check_family, check_other_spelling, check_router_loss

# transformers gives the embedding of a padding token no gradient.
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "pad_token_id": None}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip_qkv": 0.8, "norm_topk_prob": True, "tie_word_embeddings": True},
        {"num_key_value_heads": 4, "attention_bias": True, "num_experts_per_tok": 3},
    ],
)
def test_equals_transformers(tmp_path, changes):
    """Norms over all heads, clipped or not, weights normalised or not."""
    check_family(tmp_path, OlmoeConfig(**SIZES | HEADS | EXPERTS | changes))


def test_trains_with_the_load_balancing_loss(tmp_path):
    """As transformers does where the config asks for it."""
    balanced = {"output_router_logits": True, "router_aux_loss_coef": 0.3}
    check_router_loss(tmp_path, OlmoeConfig(**SIZES | HEADS | EXPERTS | balanced))


def test_equals_transformers_where_the_config_is_of_the_release(tmp_path):
    """The base of rotary at the top level, no scaling."""
    changes = {"rope_theta": 500.0, "rope_scaling": None}
    check_other_spelling(tmp_path, OlmoeConfig(**SIZES | HEADS | EXPERTS), changes, without=["rope_parameters"])
