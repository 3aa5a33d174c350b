"""Granite's mixtures of experts against transformers."""

import pytest
from transformers import GraniteMoeConfig, GraniteMoeSharedConfig

from tests.models.oracle import HEADS, SIZES, check_family, check_other_spelling, check_rewritten, check_router_loss
from torchtune.checkpoint.load import load_model

MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.3,
    "logits_scaling": 4.0,
}
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    "config",
    [
        GraniteMoeConfig(**SIZES | HEADS | EXPERTS),
        GraniteMoeConfig(**SIZES | HEADS | EXPERTS | MULTIPLIERS | {"attention_bias": True, "num_experts_per_tok": 3}),
        GraniteMoeSharedConfig(**SIZES | HEADS | EXPERTS | MULTIPLIERS | {"shared_intermediate_size": 20}),
        GraniteMoeSharedConfig(**SIZES | HEADS | EXPERTS | {"tie_word_embeddings": True}),
    ],
)
def test_equals_transformers(tmp_path, config):
    """Multipliers, biases, with a shared expert and without one."""
    check_family(tmp_path, config)


def test_names_are_the_checkpoints(tmp_path):
    """Experts, router and shared expert stand under the names of the released files."""
    check_family(tmp_path, GraniteMoeSharedConfig(**SIZES | HEADS | EXPERTS | {"shared_intermediate_size": 20}))
    names = load_model(tmp_path / "source").state_dict()
    layer = "model.layers.1."
    for name in ("input_linear", "output_linear", "router.layer"):
        assert f"{layer}block_sparse_moe.{name}.weight" in names
    assert f"{layer}shared_mlp.input_linear.weight" in names


def test_reads_the_names_of_newer_tools(tmp_path):
    """As transformers 5 has them in memory: read, and written so again."""

    def rewrite(tensors):
        new = {
            "block_sparse_moe.input_linear.weight": "block_sparse_moe.experts.gate_up_proj",
            "block_sparse_moe.output_linear.weight": "block_sparse_moe.experts.down_proj",
            "block_sparse_moe.router.layer.weight": "block_sparse_moe.router.weight",
        }
        for old, name in new.items():
            tensors = {key.replace(old, name): tensor for key, tensor in tensors.items()}
        return tensors

    check_rewritten(tmp_path, GraniteMoeConfig(**SIZES | HEADS | EXPERTS), rewrite)


def test_trains_with_the_load_balancing_loss(tmp_path):
    """As transformers does where the config asks for it."""
    balanced = {"output_router_logits": True, "router_aux_loss_coef": 0.3}
    check_router_loss(tmp_path, GraniteMoeConfig(**SIZES | HEADS | EXPERTS | balanced))


def test_equals_transformers_where_the_config_is_of_the_release(tmp_path):
    """The base of rotary at the top level, no scaling."""
    config = GraniteMoeSharedConfig(**SIZES | HEADS | EXPERTS | MULTIPLIERS | {"shared_intermediate_size": 20})
    changes = {"rope_theta": 500.0, "rope_scaling": None}
    check_other_spelling(tmp_path, config, changes, without=["rope_parameters"])
