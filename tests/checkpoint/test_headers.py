"""safetensors whose header does not fit itself or the file: one error that names file and tensor."""

import json

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from tests.tiny_checkpoint import save_tiny_checkpoint
from torchtune.checkpoint.headers import read_safetensors_header
from torchtune.checkpoint.load import load_model
from torchtune.checkpoint.open import open_checkpoint
from torchtune.errors import CheckpointError

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def write(path, header, num_bytes=32):
    """A safetensors file with a header that nobody checked."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_bytes))
    return path


def changed(name, **fields):
    return {**GOOD, name: {**GOOD[name], **fields}}


@pytest.mark.parametrize(
    ("header", "num_bytes", "said"),
    [
        (GOOD, 31, "bytes where its header says .* tensor 'b' is cut off"),
        (GOOD, 5, "tensor 'a' and 1 more are cut off"),
        (GOOD, 40, "bytes where its header says"),
        (changed("a", dtype="F33"), 32, "tensor 'a' has the type F33"),
        (
            changed("a", shape=[2, 2]),
            32,
            r"tensor 'a' \(2, 2\) of torch.float32 takes 16 bytes, its header gives it 24",
        ),
        (changed("b", data_offsets=[16, 24]), 24, "tensors 'a' and 'b' overlap by 8 bytes"),
        (changed("b", data_offsets=[28, 36]), 36, "4 bytes before tensor 'b' belong to none"),
        (changed("b", data_offsets=[32, 24]), 32, "tensor 'b' is said to be"),
        (changed("b", data_offsets=[24, 10**18]), 32, "tensor 'b' is cut off"),
        (changed("b", shape=[-4]), 32, "tensor 'b' is said to be"),
        (changed("b", shape=None), 32, "tensor 'b' is said to be"),
        ({**GOOD, "b": 3}, 32, "tensor 'b' is said to be 3"),
        ([], 32, "no object"),
        (b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": {}}', 1, "'a' is there twice"),
        (b'{"a": ', 32, "its header is damaged"),
    ],
)
def test_a_header_that_is_wrong(tmp_path, header, num_bytes, said):
    """What the safetensors library refuses too, but by file and tensor."""
    path = write(tmp_path / "model.safetensors", header, num_bytes)
    with pytest.raises(CheckpointError, match=f"model.safetensors: .*{said}"):
        read_safetensors_header(path)
    with pytest.raises(SafetensorError):
        safe_open(path, framework="pt")


@pytest.mark.parametrize("dtype", [torch.uint16, torch.complex64, torch.float8_e5m2, torch.bool, torch.int64])
def test_shapes_and_types_are_those_that_were_saved(tmp_path, dtype):
    """A scalar, an empty tensor and a matrix, of types that are seldom."""
    saved = {"scalar": torch.zeros(()), "empty": torch.zeros(0, 3), "matrix": torch.zeros(2, 5)}
    saved = {name: tensor.to(dtype) for name, tensor in saved.items()}
    save_file(saved, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_safetensors_header(tmp_path / "x.safetensors")
    assert {name: (header.shape, header.dtype) for name, header in found.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in saved.items()
    }


@pytest.fixture
def sharded(tmp_path):
    return save_tiny_checkpoint(tmp_path / "sharded", max_shard_size="100KB")


def test_an_index_that_names_a_tensor_which_its_shard_lacks(sharded):
    """The index, the shard and the tensor."""
    shard = sorted(sharded.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, shard)
    with pytest.raises(CheckpointError, match=rf"index.json: says that {shard.name} holds '{name}', which it does not"):
        open_checkpoint(sharded)


def test_a_tensor_in_two_shards(sharded):
    """Which of the two is meant can't be told."""
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    name = sorted(load_file(first))[0]
    save_file({**load_file(second), name: torch.zeros(1)}, second)
    with pytest.raises(CheckpointError, match=rf"{first.name} holds '{name}', and {second.name} holds it too"):
        open_checkpoint(sharded)


def test_a_tensor_that_the_index_leaves_out_is_told(sharded, caplog):
    """It is not read, and not silently."""
    first = sorted(sharded.glob("*.safetensors"))[0]
    save_file({**load_file(first), "extra": torch.zeros(1)}, first)
    assert "extra" not in open_checkpoint(sharded).tensors
    assert f"{first.name} holds 'extra'" in caplog.text


def test_a_shard_cut_short(sharded):
    """By name, with a tensor that is lost, before a weight is used."""
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(
        CheckpointError, match=rf"{shard.name}: it has \d+ bytes where .* tensor 'model\.\S+' is cut off"
    ):
        load_model(sharded)


def test_a_tensor_of_another_shape_is_told_with_its_file(sharded):
    """Among shards the file has to be known."""
    shard = next(file for file in sharded.glob("*.safetensors") if "model.norm.weight" in load_file(file))
    save_file({**load_file(shard), "model.norm.weight": torch.ones(3)}, shard)
    with pytest.raises(CheckpointError) as caught:
        load_model(sharded)
    assert f"'model.norm.weight' has the shape (3,), the config says (64,) ({shard.name})" in str(caught.value)


@pytest.mark.parametrize("content", ["[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{"])
def test_an_index_that_is_none(sharded, content):
    """Named."""
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index.json"):
        open_checkpoint(sharded)
