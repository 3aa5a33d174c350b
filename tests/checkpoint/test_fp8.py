"""Weights in FP8 by blocks, against a plain loop and against transformers' own reading of them."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import DeepseekV3Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.models.auto import AutoModelForCausalLM

from tests.models.oracle import save_random, stored_tensors
from tests.models.support import config_of
from torchtune.checkpoint.fp8 import dequantise
from torchtune.checkpoint.load import load_model
from torchtune.checkpoint.open import open_checkpoint
from torchtune.checkpoint.save import save_model
from torchtune.errors import CheckpointError

BLOCK = (16, 8)


def quantised(weight):
    """A matrix in float8 and the scales of its blocks, those at the edges cut."""
    rows, columns = BLOCK
    scale = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    packed = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            scale[i, j] = block.abs().max() / 448
            packed[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = (block / scale[i, j]).to(packed.dtype)
    return packed, scale


def quantised_folder(folder):
    """A checkpoint as DeepSeek V3 is released: the layers' matrices in float8, the rest bfloat16."""
    config = config_of("deepseek_v3")
    assert isinstance(config, DeepseekV3Config)
    save_random(folder, config)
    tensors = {}
    for name, tensor in stored_tensors(folder).items():
        if tensor.dim() == 2 and ".layers." in name and not name.endswith("mlp.gate.weight"):
            tensors[name], tensors[f"{name}_scale_inv"] = quantised(tensor)
        else:
            tensors[name] = tensor if "correction_bias" in name else tensor.bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    values |= {"dtype": "bfloat16", "quantization_config": {"quant_method": "fp8", "weight_block_size": list(BLOCK)}}
    (folder / "config.json").write_text(json.dumps(values))
    return tensors


def test_a_block_at_a_time():
    """Each value times its block's scale, blocks at the edges too; whole blocks as transformers has them."""
    weight = torch.randn(40, 19)
    packed, scale = quantised(weight)
    found = dequantise(packed, scale, BLOCK)
    for i in range(40):
        for j in range(19):
            assert found[i, j] == (packed[i, j].float() * scale[i // 16, j // 8]).bfloat16()
    packed, scale = quantised(torch.randn(32, 24))
    theirs = Fp8Dequantize(None)._dequantize_one(packed, scale, torch.bfloat16)
    assert dequantise(packed, scale, BLOCK).equal(theirs)


def test_reads_scaled_matrices_and_saves_them_as_bfloat16(tmp_path):
    """What is saved has no scales, its config doesn't call it quantised, and transformers computes the same of it."""
    packed = quantised_folder(tmp_path / "packed")
    checkpoint = open_checkpoint(tmp_path / "packed")
    save_model(tmp_path / "saved", load_model(tmp_path / "packed"), checkpoint)
    saved = stored_tensors(tmp_path / "saved")
    assert saved.keys() == {name for name in packed if not name.endswith("_scale_inv")}
    assert not any(tensor.dtype == torch.float8_e4m3fn for tensor in saved.values())
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ids = torch.arange(20)[None]
    expected = theirs(ids).logits
    ours = load_model(tmp_path / "packed", dtype=torch.float32)(ids)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_refuses_a_matrix_without_its_scales(tmp_path, fault):
    """Names the tensor and the shape that its scales must have."""
    tensors = quantised_folder(tmp_path)
    name = "model.layers.1.self_attn.o_proj.weight_scale_inv"
    needed = tuple(tensors[name].shape)
    if fault == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:1].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name) as refusal:
        open_checkpoint(tmp_path)
    assert str(needed) in str(refusal.value)
