"""Qwen3's mixture of experts against transformers."""

import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

from tests.models.oracle import (
    HEADS,
    SIZES,
    assert_close,
    check_family,
    check_router_loss,
    save_random,
    stored_tensors,
)
from torchtune.checkpoint.load import load_model
from torchtune.checkpoint.open import open_checkpoint
from torchtune.checkpoint.save import save_model

IDS = torch.arange(20)[None]

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
    """Newer tools write the experts as one tensor: read, and written so again."""
    model = save_random(tmp_path / "apart", Qwen3MoeConfig(**SIZES | HEADS | EXPERTS))
    shutil.copytree(tmp_path / "apart", tmp_path / "stacked")
    save_file(model.state_dict(), tmp_path / "stacked" / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.0.mlp.experts.gate_up_proj" in stored_tensors(tmp_path / "stacked")
    ours = load_model(tmp_path / "stacked")
    assert_close(ours(IDS), load_model(tmp_path / "apart")(IDS), 0, "logits")
    save_model(tmp_path / "saved", ours, open_checkpoint(tmp_path / "stacked"))
    before, after = stored_tensors(tmp_path / "stacked"), stored_tensors(tmp_path / "saved")
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
