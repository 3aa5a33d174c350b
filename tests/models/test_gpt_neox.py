"""GPT-NeoX against transformers: heads in one matrix, blocks side by side, and the names and buffers of old files."""

import pytest
import torch
from transformers import GPTNeoXConfig

from tests.models.oracle import SIZES, check_family, check_other_spelling, check_rewritten

BASE = SIZES | {"num_attention_heads": 4, "max_position_embeddings": 128}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_parallel_residual": False, "tie_word_embeddings": True, "hidden_act": "gelu_new"},
        {"num_attention_heads": 1, "attention_bias": False, "layer_norm_eps": 1e-3, "intermediate_size": 37},
        {"num_attention_heads": 2, "rope_parameters": YARN | {"partial_rotary_factor": 1.0}},
        {"hidden_size": 40, "num_attention_heads": 2, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    ],
)
def test_equals_transformers(tmp_path, changes):
    """Logits, gradients, packed and cached forms, and what is written; a quarter of each head is turned by default."""
    check_family(tmp_path, GPTNeoXConfig(**BASE | changes))


@pytest.mark.parametrize("changes", [{}, {"rotary_pct": 0.5, "rotary_emb_base": 700}, {"rotary_pct": 1.0}])
def test_config_of_the_first_release(tmp_path, changes):
    """`rotary_pct` and `rotary_emb_base`, defaults left out."""
    left_out = "rope_parameters layer_norm_eps tie_word_embeddings attention_bias hidden_act use_parallel_residual"
    check_other_spelling(tmp_path, GPTNeoXConfig(**BASE), changes, without=left_out.split())


@pytest.mark.parametrize("head", ["embed_out.", "lm_head."])
def test_old_files(tmp_path, head):
    """Masks and frequencies that old files hold are written again, the head under either name."""

    def rewrite(tensors):
        renamed = {name.replace("embed_out.", head): tensor for name, tensor in tensors.items()}
        assert f"{head}weight" in renamed
        for index in range(SIZES["num_hidden_layers"]):
            path = f"gpt_neox.layers.{index}.attention."
            renamed[path + "bias"] = torch.ones(1, 1, 128, 128, dtype=torch.bool).tril()
            renamed[path + "masked_bias"] = torch.tensor(-1e9)
            renamed[path + "rotary_emb.inv_freq"] = torch.rand(1)
        return renamed

    check_rewritten(tmp_path, GPTNeoXConfig(**BASE), rewrite)
