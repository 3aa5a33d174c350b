"""The text part of Mistral 3 against transformers."""

import pytest
from transformers import Mistral3Config

from tests.models.oracle import HEADS, SIZES, all_under_model, check_family, check_other_spelling, check_rewritten
from torchtune.errors import UnsupportedError
from torchtune.models.build import build_model

BASE = SIZES | HEADS | {"head_dim": 8, "pad_token_id": None}
VISION = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
}


def seeing(model_type: str, *, tied: bool, **text) -> Mistral3Config:
    options = BASE | {"model_type": model_type} | text
    return Mistral3Config(text_config=options, vision_config=VISION, tie_word_embeddings=tied)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("model_type", "text"),
    [
        ("mistral", {"sliding_window": 6}),
        ("ministral3", {"num_key_value_heads": 4}),
        ("ministral", {"sliding_window": 6, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    ],
)
def test_text_part_equals_transformers(tmp_path, model_type, text, tied):
    """Logits, gradients and a round trip that leaves vision tower and projector as they were."""
    check_family(tmp_path, seeing(model_type, tied=tied, **text))


def test_config_of_the_first_release(tmp_path):
    """No word on ties, and a head of its own; the rotary base at the top of the text part."""
    left_out = ["tie_word_embeddings", "text_config.tie_word_embeddings", "text_config.rope_parameters"]
    changes = {"text_config": {"rope_theta": 1e9, "sliding_window": None}}
    check_other_spelling(tmp_path, seeing("mistral", tied=False), changes, without=left_out)


def test_everything_under_model(tmp_path):
    """The other way in which such checkpoints are written."""
    check_rewritten(tmp_path, seeing("mistral", tied=False), all_under_model)


def test_a_text_part_of_another_kind_is_refused():
    """With the kinds that there are."""
    with pytest.raises(UnsupportedError, match="model_type 'llama' is not supported; supported: mistral,"):
        build_model({"model_type": "mistral3", "text_config": {"model_type": "llama"}})
