"""Each rank reads its part of a checkpoint, whatever has split the model."""

import itertools

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from transformers import Qwen3MoeConfig

from tests.checkpoint.in_parts import built, built_in_parts, shard
from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_config
from torchtune.checkpoint import tensor_file
from torchtune.checkpoint.folder import open_files
from torchtune.distributed.part import Part, local, parts
from torchtune.errors import CheckpointError
from torchtune.modules.stored import stored_tensors


def read_in_parts(folder, how, dtype):
    """Whether all that this rank holds is its part of what one device reads; how much that is, and is read of the file."""
    whole, checkpoint = built(folder)
    checkpoint.load_into(whole, param_dtype=dtype)
    model, checkpoint = built_in_parts(folder, how)
    checkpoint.load_into(model, param_dtype=dtype)
    held = parts(model)
    for name, tensor in stored_tensors(model).items():
        mine = local(tensor)
        assert torch.equal(mine, held[name].of(dict(stored_tensors(whole))[name])), name
        assert mine.dtype == tensor.dtype
        assert isinstance(tensor, torch.nn.Parameter)
    return sum(local(parameter).numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    # Sizes that two and four ranks can't share evenly are among them.
    config = tiny_config(tie_word_embeddings=False, intermediate_size=99, vocab_size=397)
    return save_tiny_checkpoint(tmp_path_factory.mktemp("dense") / "model", config, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    config = Qwen3MoeConfig(
        **{key: getattr(tiny_config(), key) for key in ("vocab_size", "hidden_size", "num_attention_heads")},
        num_hidden_layers=1,
        num_key_value_heads=2,
        num_experts=6,
        moe_intermediate_size=12,
        num_experts_per_tok=2,
    )
    return save_tiny_checkpoint(tmp_path_factory.mktemp("mixture") / "model", config)


@pytest.mark.parametrize("how", ["shard", "split"])
def test_two_ranks_read_their_parts(two_ranks, dense, mixture, how):
    for folder, dtype in itertools.product((dense, mixture), (torch.float32, torch.bfloat16)):
        held = two_ranks.run(read_in_parts, folder, how, dtype)
        assert max(held) < 0.6 * sum(held)


@pytest.mark.parametrize("how", ["shard", "hybrid", "split and shard"])
def test_four_ranks_read_their_parts(four_ranks, dense, mixture, how):
    for folder in (dense, mixture):
        four_ranks.run(read_in_parts, folder, how, torch.float32)


def step_after_reading(folder):
    """FSDP takes what was read for its own: the outputs of a forward, and the weights after a step."""
    whole, checkpoint = built(folder)
    checkpoint.load_into(whole)
    model, checkpoint = built(folder)
    for frozen in (model, whole):
        frozen.model.embed_tokens.requires_grad_(False)
    shard(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    checkpoint.load_into(model)
    ids = torch.arange(12)
    outputs = [each(ids) for each in (model, whole)]
    torch.testing.assert_close(*outputs)
    for each, out, share in zip((model, whole), outputs, (dist.get_world_size(), 1), strict=True):
        (out.square().sum() / share).backward()
        torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=1e-3).step()
    held, wanted = parts(model), dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(local(parameter).detach(), held[name].of(wanted[name].detach()), msg=name)


def test_what_was_read_is_trained(two_ranks, dense):
    two_ranks.run(step_after_reading, dense)


def test_a_checkpoint_that_does_not_fit_is_told_by_whole_shapes(tmp_path, two_ranks):
    folder = save_tiny_checkpoint(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(32)
    save_file(tensors, folder / "model.safetensors")
    for message in two_ranks.run(error_of_reading, folder):
        assert "'model.norm.weight' has the shape (32,), the config says (64,)" in message


def error_of_reading(folder):
    model, checkpoint = built_in_parts(folder, "shard")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_into(model)
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("stretch_bytes", [1, 10**9])
def test_any_part_of_a_tensor_is_read(tmp_path, monkeypatch, suffix, stretch_bytes):
    """Rows, columns and blocks of up to four dims, in small blocks of rows and stretch by stretch."""
    monkeypatch.setattr(tensor_file, "BLOCK_BYTES", 64)
    monkeypatch.setattr(tensor_file, "STRETCH_BYTES", stretch_bytes)
    shapes = {"scalar": (), "row": (9,), "matrix": (7, 10), "stack": (3, 4, 6), "four": (3, 2, 5, 4)}
    tensors = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()}
    path = tmp_path / f"model.{suffix}"
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    source = open_files([path])
    for name, shape in shapes.items():
        choices = [
            [((0, size),), ((1, size),), ((0, 1), (size - 1, size)) if size > 2 else ((0, 1),), ()] for size in shape
        ]
        for ranges in itertools.product(*choices):
            part = Part(shape, ranges)
            assert torch.equal(source.read_part(name, part), part.of(tensors[name])), (name, ranges)
