"""Gemma 3 against transformers: the text model, and the text part of one that sees."""

import pytest
from transformers import Gemma3Config, Gemma3TextConfig

from tests.models.oracle import HEADS, SIZES, all_under_model, check_family, check_other_spelling, check_rewritten
from torchtune.checkpoint.load import load_model
from torchtune.errors import UnsupportedError
from torchtune.models.build import build_model

BASE = SIZES | HEADS | {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 12}
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 3e3}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def seeing(**text) -> Gemma3Config:
    """A config whose text part has a window on all layers but the third."""
    tied = text.pop("tie_word_embeddings", True)
    options = BASE | {"sliding_window_pattern": 3} | text
    return Gemma3Config(text_config=options, vision_config=VISION, mm_tokens_per_image=4, tie_word_embeddings=tied)


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window_pattern": 2},
        {"num_hidden_layers": 7, "num_key_value_heads": 4, "head_dim": 14},
        {
            "attention_bias": True,
            "tie_word_embeddings": False,
            "hidden_activation": "silu",
            "sliding_window_pattern": 3,
        },
        {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": YARN}, "sliding_window_pattern": 2},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "final_logit_softcapping": 2.0},
    ],
)
def test_text_equals_transformers(tmp_path, changes):
    """Norms on heads, frequencies of their own for each kind of layer, windows by pattern or list."""
    check_family(tmp_path, Gemma3TextConfig(**BASE | changes))


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_theta": 5e4, "rope_local_base_freq": 700.0},
        {"rope_theta": 5e4, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        {"rope_scaling": {"factor": 4.0, "rope_type": "yarn", "original_max_position_embeddings": 16}},
    ],
)
def test_config_of_the_first_release(tmp_path, rope):
    """A pattern instead of a list, and a base for each kind of layer, the scaling for those that see all."""
    left_out = ("layer_types", "rope_parameters", "rms_norm_eps", "tie_word_embeddings", "final_logit_softcapping")
    changes = {"sliding_window_pattern": 2, "cache_implementation": "hybrid"} | rope
    check_other_spelling(tmp_path, Gemma3TextConfig(**BASE), changes, without=left_out)


def test_a_flat_rope_is_refused():
    """One set of options for all layers could mean either kind."""
    with pytest.raises(UnsupportedError, match="stand under 'full_attention' and 'sliding_attention'"):
        build_model({"model_type": "gemma3_text", "rope_parameters": LINEAR} | BASE)


@pytest.mark.parametrize("tied", [True, False])
def test_text_part_equals_transformers(tmp_path, tied):
    """Logits, gradients and a round trip that leaves vision tower and projector as they were."""
    check_family(tmp_path, seeing(tie_word_embeddings=tied, final_logit_softcapping=2.0))


def test_text_config_of_the_first_release(tmp_path):
    """It says sizes, windows and scaling, and leaves to the defaults what is one."""
    text = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256}
    names = (
        "num_attention_heads num_key_value_heads head_dim query_pre_attn_scalar layer_types rope_parameters "
        "rms_norm_eps hidden_activation max_position_embeddings tie_word_embeddings"
    )
    left_out = [f"text_config.{name}" for name in names.split()]
    changes = {"text_config": {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window_pattern": 3}}
    check_other_spelling(tmp_path, seeing(**text), changes, without=[*left_out, "tie_word_embeddings"])


@pytest.mark.parametrize("tied", [True, False])
def test_names_of_the_second_release(tmp_path, tied):
    """Everything stands under `model.`, the head beside it; they are read and written so."""
    check_rewritten(tmp_path, seeing(tie_word_embeddings=tied), all_under_model)
    names = load_model(tmp_path / "source").state_dict()
    assert "model.language_model.layers.2.self_attn.q_norm.weight" in names
    assert ("lm_head.weight" in names) is not tied
