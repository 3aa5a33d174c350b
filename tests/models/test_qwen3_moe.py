"""Qwen3's mixture of experts against transformers."""

import pytest
import torch
from transformers import Qwen3MoeConfig

from tests.models.oracle import (
    HEADS,
    SIZES,
    check_family,
    check_other_spelling,
    check_rewritten,
    check_router_loss,
)

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_topk_prob": True},
        {"decoder_sparse_step": 2, "attention_bias": True, "tie_word_embeddings": True, "head_dim": 12},
        {"mlp_only_layers": [0, 2], "use_sliding_window": True, "sliding_window": 6, "num_experts_per_tok": 3},
        {"num_experts": 3, "num_experts_per_tok": 1, "num_key_value_heads": 4, "hidden_act": "gelu"},
    ],
)
def test_equals_transformers(tmp_path, changes):
    """Weights normalised or not, layers without experts, windows, one expert a token."""
    check_family(tmp_path, Qwen3MoeConfig(**SIZES | HEADS | EXPERTS | changes))


def test_trains_with_the_load_balancing_loss(tmp_path):
    """As transformers does where the config asks for it."""
    balanced = {"output_router_logits": True, "router_aux_loss_coef": 0.3}
    check_router_loss(
        tmp_path,
        Qwen3MoeConfig(**SIZES | HEADS | balanced | EXPERTS | {"mlp_only_layers": [1], "norm_topk_prob": True}),
    )


def test_reads_experts_that_are_stacked_on_disk(tmp_path):
    """Newer tools write the experts of a layer as one tensor: read, and written so again."""

    def rewrite(tensors):
        rest = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
        for layer in range(3):
            experts = f"model.layers.{layer}.mlp.experts."
            gate, up, down = (
                torch.stack([tensors[f"{experts}{e}.{name}_proj.weight"] for e in range(6)])
                for name in ("gate", "up", "down")
            )
            rest |= {f"{experts}gate_up_proj": torch.cat((gate, up), dim=1), f"{experts}down_proj": down}
        return rest

    check_rewritten(tmp_path, Qwen3MoeConfig(**SIZES | HEADS | EXPERTS), rewrite)


def test_equals_transformers_where_the_config_is_of_the_release(tmp_path):
    """The base of rotary at the top level, a window that is not used, and both names for the number of experts."""
    changes = {"rope_theta": 1e6, "sliding_window": 5, "max_window_layers": 1, "num_experts": 6}
    without = ["rope_parameters", "num_local_experts", "attention_bias", "mlp_only_layers"]
    check_other_spelling(tmp_path, Qwen3MoeConfig(**SIZES | HEADS | EXPERTS), changes, without=without)
