"""Weights in MXFP4 against transformers' own reading of them, and against the format's own words."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from transformers import GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.models.oracle import HEADS, SIZES, save_random, stored_tensors
from torchtune.checkpoint.load import load_model
from torchtune.checkpoint.mxfp4 import dequantise
from torchtune.checkpoint.open import open_checkpoint
from torchtune.checkpoint.save import save_model
from torchtune.distributed.part import Part
from torchtune.errors import CheckpointError

CONFIG = GptOssConfig(**SIZES | HEADS | {"intermediate_size": 64, "num_local_experts": 3, "num_experts_per_tok": 2})


def random_packed(num_experts, num_out, num_in, *, scales=(100, 140)):
    blocks = torch.randint(0, 256, (num_experts, num_out, num_in // 32, 16), dtype=torch.uint8)
    return blocks, torch.randint(*scales, (num_experts, num_out, num_in // 32), dtype=torch.uint8)


def packed_folder(folder):
    """A checkpoint as gpt-oss is released: experts packed, the rest bfloat16."""
    save_random(folder, CONFIG)
    tensors = {name: tensor.bfloat16() for name, tensor in stored_tensors(folder).items()}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        num_experts, num_in, num_out = tensors.pop(name).shape
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = random_packed(
            num_experts, num_out, num_in, scales=(118, 124)
        )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "bfloat16"
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def test_equals_transformers():
    """Every byte and every scale but the one that means no number."""
    blocks, scales = random_packed(2, 24, 64, scales=(0, 255))
    blocks[0, :16, 0] = torch.arange(256, dtype=torch.uint8).view(16, 16)
    scales[1].view(-1)[:] = torch.arange(48, dtype=torch.uint8) + 207
    ours, theirs = dequantise(blocks, scales), convert_moe_packed_tensors(blocks, scales)
    assert ours.dtype == torch.bfloat16
    assert ours.equal(theirs)


def test_a_value_by_hand():
    """Low half of a byte first, sign bit highest, the scale's exponent is biased by 127, 255 is no number."""
    blocks = torch.zeros(1, 2, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0, 3] = 0b1111_0011  # 1.5, then -6
    values = dequantise(blocks, torch.tensor([[[129], [255]]], dtype=torch.uint8))
    assert values[0, 5:9, 0].tolist() == [0.0, 6.0, -24.0, 0.0]
    assert all(math.isnan(value) for value in values[0, :, 1].tolist())


def test_reads_packed_experts_and_saves_them_as_bfloat16(tmp_path):
    """What is saved is bfloat16 under the parameters' names, and the config does not call it quantised."""
    packed = packed_folder(tmp_path / "packed")
    checkpoint = open_checkpoint(tmp_path / "packed")
    assert checkpoint.held_dtype == torch.bfloat16
    model = load_model(tmp_path / "packed")
    save_model(tmp_path / "saved", model, checkpoint)
    saved = stored_tensors(tmp_path / "saved")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert not any(name.endswith(("_blocks", "_scales")) for name in saved)
    for name, tensor in saved.items():
        if name in packed:
            assert tensor.equal(packed[name])
        else:
            assert tensor.equal(convert_moe_packed_tensors(packed[f"{name}_blocks"], packed[f"{name}_scales"]))
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    source = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config == {key: value for key, value in source.items() if key != "quantization_config"}


def test_what_is_saved_equals_the_packed_model_in_transformers(tmp_path):
    """transformers unpacks the source and loads the copy: the same logits, near ours."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    packed_folder(tmp_path / "packed")
    save_model(tmp_path / "saved", load_model(tmp_path / "packed"), open_checkpoint(tmp_path / "packed"))
    ids = torch.arange(20)[None]
    unpacked = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert saved(ids).logits.equal(unpacked(ids).logits)
    ours, theirs = load_model(tmp_path / "packed", dtype=torch.float32)(ids), saved.float()(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_some_experts_are_read_alone(tmp_path):
    """A rank's experts, of them a part of the rows: what all of them read whole would give."""
    packed_folder(tmp_path)
    weights = open_checkpoint(tmp_path).weights
    name = "model.layers.0.mlp.experts.gate_up_proj"
    whole = weights.read(name)
    part = Part.all_of(whole.shape).narrow(0, 1, 2).take(2, 1, 2, stretches=(64, 64))
    assert torch.equal(weights.read_part(name, part), part.of(whole))


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_refuses_blocks_without_their_scales(tmp_path, fault):
    """Names the tensor and the shape that its scales must have."""
    tensors = packed_folder(tmp_path)
    name = "model.layers.1.mlp.experts.down_proj_scales"
    if fault == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:2].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name) as refusal:
        open_checkpoint(tmp_path)
    assert ("there are none" if fault == "missing" else "(2, 32, 2)") in str(refusal.value)


def test_unpacking_holds_one_expert_at_a_time():
    """Beside the result no more is in memory than the work of one expert of sixteen."""
    blocks, scales = random_packed(16, 256, 512)
    _, peak = measured(lambda: dequantise(blocks, scales))
    assert peak < 1.8 * 16 * 256 * 512 * 2


def measured(function):
    """What a function returns, and the most bytes of tensors that were alive within it."""
    alive = peak = 0
    with torch.profiler.profile(profile_memory=True) as profile:
        result = function()
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return result, peak
