"""Files of torch.save as weights: .bin folders, sharded or not, old or new, and what is wrong with some."""

import json
import os
import shutil
from zipfile import ZipFile

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, Qwen2Config
from transformers.models.auto import AutoModelForCausalLM

from tests.models.oracle import HEADS, SIZES, assert_close, random_model
from torchtune.checkpoint.load import load_model
from torchtune.checkpoint.open import open_checkpoint
from torchtune.checkpoint.pickles import PickleFile
from torchtune.checkpoint.save import save_model
from torchtune.errors import CheckpointError, UnsupportedError

INDEX = "pytorch_model.bin.index.json"


def write_bins(folder, tensors, *, num_shards=1, is_zip=True):
    """Tensors as transformers wrote them before safetensors."""
    if num_shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
        return
    names = sorted(tensors)
    weight_map = {}
    for shard in range(num_shards):
        file_name = f"pytorch_model-{shard + 1:05}-of-{num_shards:05}.bin"
        share = {name: tensors[name] for name in names[shard::num_shards]}
        torch.save(share, folder / file_name, _use_new_zipfile_serialization=is_zip)
        weight_map |= dict.fromkeys(share, file_name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def theirs():
    return random_model(LlamaConfig(**SIZES, **HEADS))


@pytest.fixture
def folder(tmp_path, theirs):
    """A folder that has everything but weights."""
    theirs.config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_bin_folder_loads_and_is_saved_as_safetensors(tmp_path, folder, theirs, num_shards, is_zip):
    """transformers' logits, then a folder that it loads whole, with the same bits."""
    write_bins(folder, theirs.state_dict(), num_shards=num_shards, is_zip=is_zip)
    ids = torch.arange(30)[None]
    model = load_model(folder)
    assert_close(model(ids), theirs(ids).logits, 1e-5, "logits")
    save_model(tmp_path / "out", model, open_checkpoint(folder))
    assert {file.suffix for file in (tmp_path / "out").iterdir()} == {".json", ".safetensors"}
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in theirs.state_dict().items())


def test_the_type_of_each_tensor_is_kept(tmp_path, folder, theirs):
    """bfloat16 with float32 norms, a tensor that is a view of another and one that is not contiguous."""
    tensors = {name: t if t.dim() == 1 else t.bfloat16() for name, t in theirs.state_dict().items()}
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.contiguous().T
    tensors["model.norm.weight"] = torch.cat([torch.zeros(3), tensors["model.norm.weight"]])[3:]
    write_bins(folder, tensors)
    save_model(tmp_path / "out", load_model(folder, dtype=torch.float32), open_checkpoint(folder))
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(saved[name].dtype == tensors[name].dtype and saved[name].equal(tensors[name]) for name in saved)


@pytest.mark.parametrize("is_zip", [True, False])
def test_what_is_read_is_the_callers(tmp_path, is_zip):
    """Views, transposes, scalars and tensors that share memory come in memory of their own, the file unchanged."""
    base = torch.arange(12.0).view(3, 4)
    tensors = {"base": base, "same": base, "view": base[1:], "transposed": base.T, "one": base[0, 1], "none": base[:0]}
    torch.save(tensors, tmp_path / "x.bin", _use_new_zipfile_serialization=is_zip)
    file = PickleFile(tmp_path / "x.bin")
    for name in tensors:
        found = file.read(name)
        assert found.is_contiguous()
        assert found.equal(tensors[name])
        found.zero_()
    assert all(file.read(name).equal(tensor) for name, tensor in tensors.items())


def test_another_machines_byte_order(folder, theirs):
    """torch crashes where it looks at such a file's header, so the file is refused."""
    write_bins(folder, theirs.state_dict())
    with ZipFile(folder / "pytorch_model.bin") as old, ZipFile(folder / "big.bin", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"big" if name.endswith("/byteorder") else old.read(name))
    with pytest.raises(CheckpointError, match=r"big.bin: is of another byte order"):
        open_checkpoint(folder / "big.bin")


@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
def test_weights_may_lie_among_other_things(folder, theirs, wrapper):
    """A trainer's file, with counters beside the weights."""
    torch.save({wrapper: theirs.state_dict(), "epoch": 3, "optimizer": {}}, folder / "pytorch_model.bin")
    assert open_checkpoint(folder).tensors.keys() == theirs.state_dict().keys()


def test_a_set_without_an_index_is_complete_by_its_names(folder, theirs):
    """The first library numbers its files; one that is absent is told by its number."""
    write_bins(folder, theirs.state_dict(), num_shards=3)
    (folder / INDEX).unlink()
    for number in (1, 2, 3):
        (folder / f"pytorch_model-0000{number}-of-00003.bin").rename(folder / f"model-0000{number}-of-00003.bin")
    assert open_checkpoint(folder).tensors.keys() == theirs.state_dict().keys()
    assert open_checkpoint(folder / "model-00002-of-00003.bin").tensors.keys() == theirs.state_dict().keys()
    (folder / "model-00002-of-00003.bin").unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-00003.bin: .* 3 files, of which number 2 is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize("is_zip", [True, False])
def test_case_c074_code_is_not_run(tmp_path, folder, is_zip):
    """Refused by file, with what it would have called and what to do."""
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {marker}",))

    content = {"model.norm.weight": torch.ones(4), "x": Evil()}
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: holds 'posix.system', which can run code") as caught:
        open_checkpoint(folder)
    assert "safetensors" in str(caught.value)
    with pytest.raises(CheckpointError, match="pytorch_model.bin"):
        load_model(folder)
    assert not marker.exists()


def test_case_c074_safetensors_win(folder, theirs, caplog):
    """Zeros in the .bin beside them are not read, and that is said."""
    theirs.save_pretrained(folder)
    write_bins(folder, {name: torch.zeros_like(tensor) for name, tensor in theirs.state_dict().items()})
    ids = torch.arange(30)[None]
    assert_close(load_model(folder)(ids), theirs(ids).logits, 1e-5, "logits")
    assert "read from model.safetensors; not from pytorch_model.bin beside it" in caplog.text


def test_what_trainers_leave_beside_weights_is_none(folder, theirs, caplog):
    """training_args.bin holds code and is not even looked at."""
    write_bins(folder, theirs.state_dict())
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "adapter_model.bin"):
        (folder / name).write_bytes(b"no weights")
    assert open_checkpoint(folder).tensors.keys() == theirs.state_dict().keys()
    assert not caplog.records


def test_a_missing_shard(folder, theirs):
    """C054 for .bin: the index, the file, how many tensors and one of them."""
    write_bins(folder, theirs.state_dict(), num_shards=3)
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(
        CheckpointError,
        match=rf"{INDEX}: names pytorch_model-00002-of-00003.bin, which is missing; it holds .* tensors, 'model",
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.0001, 0.3, 0.9, 0.9999])
def test_a_file_cut_short(folder, theirs, share, is_zip):
    """C075 for .bin: named with its size, wherever it ends."""
    write_bins(folder, theirs.state_dict(), is_zip=is_zip)
    file = folder / "pytorch_model.bin"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    size = file.stat().st_size
    with pytest.raises(
        CheckpointError, match=rf"pytorch_model.bin: ({size} bytes are no complete|holds something else)"
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([torch.ones(3)], "holds no tensors by name but a list"),
        ({}, "holds no tensors by name"),
        ({"model.norm.weight": torch.ones(3), "steps": 3}, "'steps' is no plain tensor but int"),
        (
            {"model.norm.weight": torch.eye(3).to_sparse()},
            "'model.norm.weight' is no plain tensor but torch.sparse_coo",
        ),
    ],
)
def test_a_file_of_something_else(folder, content, said):
    """Named, with what it holds."""
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=f"pytorch_model.bin: {said}"):
        open_checkpoint(folder)


def test_a_tensor_of_another_shape(folder, theirs):
    """The tensor, both shapes and the file, before a weight is read."""
    tensors = {**theirs.state_dict(), "model.layers.1.mlp.up_proj.weight": torch.ones(5, 32)}
    write_bins(folder, tensors, num_shards=2)
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    assert "'model.layers.1.mlp.up_proj.weight' has the shape (5, 32), the config says (48, 32)" in str(caught.value)
    assert "(pytorch_model-0000" in str(caught.value)


def test_a_tensor_in_two_files(folder, theirs):
    """Which is meant can't be told, with an index or without."""
    write_bins(folder, theirs.state_dict(), num_shards=2)
    first, second = (folder / f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2))
    name = next(iter(torch.load(first)))
    torch.save(torch.load(second) | {name: torch.zeros(1)}, second)
    with pytest.raises(CheckpointError, match=rf"{first.name} holds '{name}', and {second.name} holds it too"):
        open_checkpoint(folder)
    (folder / INDEX).unlink()
    with pytest.raises(CheckpointError, match=rf"{second.name}: holds the tensor '{name}', which {first.name} has too"):
        open_checkpoint(folder)


def test_several_files_that_are_no_set(folder, theirs):
    """Refused with their names; the one that is meant can be named."""
    torch.save(theirs.state_dict(), folder / "one.bin")
    shutil.copy(folder / "one.bin", folder / "two.bin")
    with pytest.raises(CheckpointError, match=r"has several files of weights and no index: one.bin, two.bin; name one"):
        open_checkpoint(folder)
    assert open_checkpoint(folder / "two.bin").path == folder
    with pytest.raises(CheckpointError, match="config.json: is neither a folder nor a file of weights"):
        open_checkpoint(folder / "config.json")


@pytest.mark.parametrize("name", ["adapter_model.pt", "adapter_model.safetensors", "adapter_0.pt"])
def test_an_adapter_alone_is_no_checkpoint(folder, theirs, name):
    """Refused by name, as a folder and as a file."""
    torch.save(theirs.state_dict(), folder / name)
    for source in (folder, folder / name):
        with pytest.raises(UnsupportedError, match=name):
            open_checkpoint(source)


def test_a_pointer_of_git_lfs(folder):
    """A clone without git-lfs has a line of text where the weights should be."""
    (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: is a pointer of git-lfs"):
        open_checkpoint(folder)


def test_another_family_with_biases(tmp_path):
    """Nothing of it is Llama's."""
    theirs = random_model(Qwen2Config(**SIZES, **HEADS, tie_word_embeddings=True))
    theirs.config.save_pretrained(tmp_path)
    tensors = {name: tensor for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    write_bins(tmp_path, tensors, num_shards=2)
    ids = torch.arange(30)[None]
    assert_close(load_model(tmp_path)(ids), theirs(ids).logits, 1e-5, "logits")
