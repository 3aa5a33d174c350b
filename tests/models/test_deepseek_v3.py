"""DeepSeek V3 against transformers."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config

from tests.models.oracle import SIZES, assert_close, check_family, check_other_spelling, save_random, stored_tensors
from tests.models.support import LATENT
from torchtune.checkpoint.load import load_model
from torchtune.checkpoint.open import open_checkpoint
from torchtune.checkpoint.save import save_model

SMALL = SIZES | LATENT | {"bos_token_id": None, "eos_token_id": None}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None, "n_shared_experts": 2, "tie_word_embeddings": True, "v_head_dim": 24},
        {"rope_parameters": YARN, "attention_bias": True, "norm_topk_prob": False, "routed_scaling_factor": 1.7},
        {"rope_interleave": False, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "v_head_dim": 20},
    ],
)
def test_equals_transformers(tmp_path, changes):
    """Queries through a small vector or at once, values smaller and larger than keys, yarn in the scale, groups."""
    check_family(tmp_path, DeepseekV3Config(**SMALL | changes))


def test_equals_transformers_where_the_config_is_of_the_release(tmp_path):
    """`rope_scaling` with `type`, the base at the top level, and keys that say what is always so."""
    old = {key: value for key, value in YARN.items() if key not in ("rope_type", "rope_theta")} | {"type": "yarn"}
    always = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "ep_size": 1}
    check_other_spelling(
        tmp_path,
        DeepseekV3Config(**SMALL),
        {"rope_scaling": old, "rope_theta": 500, **always},
        without=["rope_parameters", "head_dim", "qk_head_dim", "rope_interleave"],
    )


def test_layers_that_predict_further_tokens_are_carried(tmp_path):
    """What lies beyond the last layer is written again byte for byte, the correction in float32, and loads."""
    source, target = tmp_path / "source", tmp_path / "target"
    save_random(source, DeepseekV3Config(**SMALL))
    tensors = stored_tensors(source)
    tensors = {name: t if "correction_bias" in name else t.bfloat16() for name, t in tensors.items()}
    first, after = "model.layers.2.", "model.layers.3."
    extra = {after + name.removeprefix(first): t for name, t in tensors.items() if name.startswith(first)}
    extra |= {after + "eh_proj.weight": torch.randn(32, 64).bfloat16(), after + "enorm.weight": torch.ones(32)}
    save_file({name: t.clone() for name, t in (tensors | extra).items()}, source / "model.safetensors")
    save_model(target, load_model(source), open_checkpoint(source))
    saved = stored_tensors(target)
    assert saved.keys() == (tensors | extra).keys()
    assert all(saved[name].equal(t) and saved[name].dtype == t.dtype for name, t in (tensors | extra).items())
    ids = torch.arange(20)[None]
    theirs = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    assert_close(load_model(target, dtype=torch.float32)(ids), theirs(ids).logits, 1e-5, "logits")
