"""Llama 4 against transformers."""

import json

import pytest
import torch
from transformers import Llama4Config, Llama4ForConditionalGeneration, Llama4TextConfig

from tests.models.oracle import HEADS, SIZES, assert_close, check_family, check_other_spelling, stored_tensors
from torchtune.checkpoint.load import load_model
from torchtune.checkpoint.open import open_checkpoint
from torchtune.checkpoint.save import save_model

SMALL = (
    SIZES
    | HEADS
    | {
        "head_dim": 8,
        "intermediate_size_mlp": 40,
        "intermediate_size": 24,
        "num_local_experts": 4,
        "attention_chunk_size": 7,
        "no_rope_layer_interval": 3,
        "floor_scale": 5,
        "attn_scale": 0.4,
        "bos_token_id": None,
        "eos_token_id": None,
    }
)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"interleave_moe_layer_step": 2, "num_experts_per_tok": 2, "use_qk_norm": False},
        # Without rotation a key's bias has no gradient to compare.
        {"attention_bias": True, "no_rope_layers": [1, 1, 1]},
        {"moe_layers": [0], "no_rope_layers": [0, 1, 1], "attn_temperature_tuning": False, "head_dim": 12},
        {
            "attention_chunk_size": None,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ],
)
def test_equals_transformers(tmp_path, changes):
    """Chunks, layers without positions and their temperature, norms after the rotation, dense layers, scaled rotary."""
    check_family(tmp_path, Llama4TextConfig(**SMALL | changes))


def test_equals_transformers_where_the_config_is_of_the_release(tmp_path):
    """Rotary options in the older spelling; the lists of layers left to their intervals."""
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    changes = {"rope_scaling": llama3 | {"rope_type": "llama3"}, "rope_theta": 500.0, "no_rope_layers": []}
    without = ["rope_parameters", "layer_types", "moe_layers"]
    check_other_spelling(tmp_path, Llama4TextConfig(**SMALL), changes, without=without)


def test_text_part_of_a_model_that_sees(tmp_path):
    """Read under its longer names; what is saved has every tensor, the vision tower's as they were, and loads."""
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vision_output_dim": 16,
        "image_size": 28,
        "patch_size": 14,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
    }
    text = Llama4TextConfig(**SMALL).to_dict()
    torch.manual_seed(0)
    theirs = Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
    theirs.save_pretrained(tmp_path / "source")
    assert json.loads((tmp_path / "source" / "config.json").read_text())["model_type"] == "llama4"
    ids = torch.arange(20)[None]
    ours = load_model(tmp_path / "source")
    expected = theirs.language_model(ids).logits  # the whole fails without images in transformers 5.24
    assert_close(ours(ids), expected, 1e-5, "logits")
    assert "language_model.model.layers.0.feed_forward.experts.gate_up_proj" in ours.state_dict()
    save_model(tmp_path / "saved", ours, open_checkpoint(tmp_path / "source"))
    before, after = stored_tensors(tmp_path / "source"), stored_tensors(tmp_path / "saved")
    assert any(name.startswith("vision_model.") for name in before)
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    again = Llama4ForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert again.language_model(ids).logits.equal(expected)
