"""Norms of queries and keys: a head's own, or of all heads as one."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Olmo2Config, Qwen3Config

from tests.models.oracle import HEADS, SIZES, check_against_transformers, save_random, stored_tensors
from torchtune.checkpoint.load import load_model
from torchtune.checkpoint.open import open_checkpoint
from torchtune.checkpoint.save import save_model
from torchtune.errors import CheckpointError

SIZES = SIZES | HEADS | {"pad_token_id": 0, "head_dim": 12}
NORMS = ("q_norm", "k_norm")


@pytest.mark.parametrize("config", [Qwen3Config, Olmo2Config])
def test_case_c072_norms_are_trained_saved_and_loaded(tmp_path, config):
    """Random weights; logits and gradients as transformers', and the file as it was but for what a step changed."""
    model = check_against_transformers(tmp_path, config(**SIZES))
    stored = stored_tensors(tmp_path / "model")
    norms = {name: parameter for name, parameter in model.named_parameters() if name.split(".")[-2] in NORMS}
    assert len(norms) == 2 * SIZES["num_hidden_layers"]
    torch.optim.SGD(norms.values(), lr=1.0).step()
    save_model(tmp_path / "saved", model, open_checkpoint(tmp_path / "model"))
    saved = stored_tensors(tmp_path / "saved")
    assert saved.keys() == stored.keys()
    for name, tensor in saved.items():
        assert torch.equal(tensor, stored[name]) == (name not in norms), name
    again = load_model(tmp_path / "saved", dtype=torch.float32)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


@pytest.mark.parametrize("config", [Qwen3Config, Olmo2Config])
@pytest.mark.parametrize("norm", NORMS)
def test_case_c072_a_weight_of_neither_length_is_refused(tmp_path, config, norm):
    save_random(tmp_path / "model", config(**SIZES))
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.1.self_attn.{norm}.weight"
    tensors[name] = torch.cat((tensors[name], tensors[name][:5]))
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        load_model(tmp_path / "model", dtype=torch.float32)
