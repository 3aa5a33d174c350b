"""Gemma 2 against transformers."""

import pytest
from transformers import Gemma2Config

from tests.models.oracle import HEADS, SIZES, check_family, check_other_spelling
from torchtune.errors import UnsupportedError
from torchtune.models.gemma2 import build

BASE = SIZES | HEADS | {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 12}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0, "head_dim": 14},
        {"attn_logit_softcapping": None, "final_logit_softcapping": None, "num_key_value_heads": 4},
        {"attention_bias": True, "tie_word_embeddings": False, "hidden_activation": "gelu"},
        {"layer_types": ["full_attention", "full_attention", "sliding_attention"], "num_key_value_heads": 1},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}, "rms_norm_eps": 1e-3},
    ],
)
def test_equals_transformers(tmp_path, changes):
    """Caps on scores and logits, windows on every second layer, a scale and head sizes of their own."""
    check_family(tmp_path, Gemma2Config(**BASE | changes))


def test_config_of_the_first_release(tmp_path):
    """No `layer_types`, the rotary base at the top, and keys that have a default left out."""
    left_out = ("layer_types", "rope_parameters", "rms_norm_eps", "attn_logit_softcapping", "tie_word_embeddings")
    changes = {"rope_theta": 3e3, "hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}
    check_other_spelling(tmp_path, Gemma2Config(**BASE), changes, without=left_out)


def test_attention_in_both_directions_is_refused():
    """An encoder's mask is not built."""
    with pytest.raises(UnsupportedError, match="use_bidirectional_attention: True"):
        build({"model_type": "gemma2", "use_bidirectional_attention": True, "num_hidden_layers": 1} | BASE)
