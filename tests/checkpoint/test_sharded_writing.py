"""Ranks write the files of a model and the state of a run from the parts that they hold."""

import json
import os

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save
from transformers import Qwen3MoeConfig
from transformers.models.auto import AutoModelForCausalLM

from tests.checkpoint.in_parts import built, built_in_parts
from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_config
from torchtune.checkpoint import held as holding
from torchtune.checkpoint import save as saving
from torchtune.checkpoint.background import Background
from torchtune.checkpoint.headers import DTYPES
from torchtune.checkpoint.held import Held
from torchtune.checkpoint.save import save_model
from torchtune.checkpoint.steps import complete_steps, verify_step, write_step
from torchtune.checkpoint.tensor_writer import TensorWriter, write_tensors
from torchtune.checkpoint.training_state import (
    load_masters,
    load_optimizer_tensors,
    load_training_state,
    optimizer_tensors,
    save_training_state,
)
from torchtune.distributed.part import held_tensors, parts
from torchtune.distributed.peers import open_peers
from torchtune.errors import CheckpointError, RankError, UnsupportedError

HOW = {2: ("whole", "shard", "split"), 4: ("whole", "shard", "hybrid", "split and shard")}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    config = tiny_config(intermediate_size=99, vocab_size=397)
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


def tensors_of(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def save_in_parts(folder, target, how, min_shard_bytes):
    with pytest.MonkeyPatch.context() as patched:  # the ranks go on with other tests
        patched.setattr(saving, "MIN_SHARD_BYTES", min_shard_bytes)
        patched.setattr(holding, "BLOCK_BYTES", 500)
        model, checkpoint = built_in_parts(folder, how)
        checkpoint.load_into(model)
        save_model(target, model, checkpoint)


@pytest.mark.parametrize("num_ranks", HOW)
def test_what_is_saved_in_parts_is_the_source(num_ranks, dense, mixture, tmp_path, request):
    """Names, types, values and config to the bit, in files enough for all ranks; transformers loads the folder."""
    pool = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[num_ranks])
    for source in (dense, mixture):
        for how in HOW[num_ranks]:
            target = tmp_path / f"{source.parent.name}-{how}"
            pool.run(save_in_parts, source, target, how, 1000)
            before, after = tensors_of(source), tensors_of(target)
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before)
            assert all(before[name].dtype == after[name].dtype for name in before)
            assert len(list(target.glob("model-*.safetensors"))) >= num_ranks
            for name in ("config.json", "tokenizer.json"):
                assert json.loads((source / name).read_text()) == json.loads((target / name).read_text())
            _, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
            assert not info["missing_keys"]
            assert not info["unexpected_keys"]


def test_a_small_model_stays_one_file(dense, tmp_path, two_ranks):
    two_ranks.run(save_in_parts, dense, tmp_path / "out", "shard", 64 * 2**20)
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_a_file_written_a_tensor_at_a_time_has_the_librarys_bytes(tmp_path):
    """All types, scalars, empty tensors and names beyond ASCII, in any order."""
    tensors = {f"é{index}": torch.ones(3, 2).to(dtype) for index, dtype in enumerate(DTYPES.values())}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4), "B": torch.ones(1), "a": torch.ones(1)}
    write_tensors(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    assert (tmp_path / "a.safetensors").read_bytes() == save(tensors, metadata={"format": "pt"})
    described = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with TensorWriter(tmp_path / "b.safetensors", described) as file:
        for name in reversed(tensors):
            file.write(name, tensors[name])
    assert (tmp_path / "b.safetensors").read_bytes() == save(tensors)


def trained(model, ranks_sum=False):
    """Adam's second step on gradients that only depend on the parameters."""
    stepped = {name: torch.nn.Parameter(tensor) for name, tensor in held_tensors(model).items()}
    optimizer = torch.optim.AdamW(stepped.values(), lr=0.1, amsgrad=True)
    names = {parameter: name for name, parameter in stepped.items()}
    return optimizer, names


def step(optimizer, names):
    for parameter in names:
        parameter.grad = parameter.detach().sin()
    optimizer.step()


def save_run(source, out, how):
    model, checkpoint = built_in_parts(source, how)
    checkpoint.load_into(model)
    optimizer, names = trained(model)
    step(optimizer, names)
    with open_peers() as peers:
        held = Held.by(model, peers)

        def write(folder):
            save_model(folder, model, checkpoint, held=held)
            tensors = {
                "optimizer": optimizer_tensors(optimizer, names)[0],
                "model": saving.masters(model, checkpoint, held),
            }
            save_training_state(folder, tensors, {"a": 1}, parts=held.parts, peers=peers)

        write_step(out, 1, write, peers=peers)
        verify_step(out / "step_1", peers)


def resume_run(source, out, how):
    """The parts that this rank holds after a further step, and which they are."""
    model, checkpoint = built_in_parts(out / "step_1", how) if dist.is_initialized() else built(out / "step_1")
    checkpoint.load_into(model)
    saved = load_training_state(out / "step_1")
    load_masters(model, saved.tensors.get("model", {}))
    optimizer, names = trained(model)
    load_optimizer_tensors(optimizer, names, saved.tensors["optimizer"], {}, parts=parts(model))
    step(optimizer, names)
    return {name: (parts(model)[name], parameter.detach().clone()) for parameter, name in names.items()}


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_a_run_is_resumed_on_any_other_number_of_ranks(kind, tmp_path, two_ranks, four_ranks, request):
    """Saved on four, two and one, resumed on each: weights, masters and moments are what one device would have."""
    source = request.getfixturevalue(kind)
    model, checkpoint = built(source)
    checkpoint.load_into(model)
    optimizer, names = trained(model)
    step(optimizer, names)
    step(optimizer, names)
    expected = {name: parameter.detach() for parameter, name in names.items()}
    saved = {}
    for num_ranks, pool in ((2, two_ranks), (4, four_ranks)):
        for how in HOW[num_ranks]:
            saved[num_ranks, how] = tmp_path / f"{num_ranks}-{how}"
            pool.run(save_run, source, saved[num_ranks, how], how)
    for folder in saved.values():
        for results in (
            [resume_run(source, folder, "")],
            two_ranks.run(resume_run, source, folder, "split"),
            four_ranks.run(resume_run, source, folder, "hybrid"),
        ):
            for held in results:
                for name, (part, tensor) in held.items():
                    assert torch.equal(tensor, part.of(expected[name])), (folder, name)


def test_what_ranks_share_is_written_once_and_by_all(dense, tmp_path, four_ranks):
    four_ranks.run(save_run, dense, tmp_path, "whole")
    files = sorted((tmp_path / "step_1" / "recipe_state").glob("optimizer-*.safetensors"))
    sizes = [file.stat().st_size for file in files]
    num_elements = sum(tensor.numel() for tensor in tensors_of(dense).values())
    assert len(sizes) == 4
    assert sum(sizes) < 3 * 4 * num_elements * 1.1
    assert max(sizes) < 2 * min(sizes)


def save_with_state_of_rows(source, out):
    """A state that has a value a row, of a matrix of which this rank has some rows."""
    model, _ = built_in_parts(source, "shard")
    tensors = {"optimizer": {"row_var/model.layers.0.mlp.up_proj.weight": torch.ones(99, 1)}}
    with open_peers() as peers, pytest.raises((UnsupportedError, RankError)) as caught:
        save_training_state(out, tensors, {}, parts=parts(model), peers=peers)
    return str(caught.value)


def test_state_that_can_not_be_split_is_refused(dense, tmp_path, two_ranks):
    for message in two_ranks.run(save_with_state_of_rows, dense, tmp_path):
        assert "'row_var/model.layers.0.mlp.up_proj.weight' (99, 1) has no value for each element" in message


def fail_in(source, out, where, failing):
    """A save in which one rank fails; what each raises."""
    model, checkpoint = built_in_parts(source, "shard")
    checkpoint.load_into(model)
    fails = dist.get_rank() == failing
    with open_peers() as peers, pytest.MonkeyPatch.context() as patched:
        patched.setattr(saving, "MIN_SHARD_BYTES", 1000)
        held = Held.by(model, peers)

        def write(folder):
            if fails and where == "files":
                held.attempt(_full)
            save_model(folder, model, checkpoint, held=held)
            if fails and where == "state":
                _full()
            save_training_state(folder, {}, {}, parts=held.parts, peers=peers)
            if fails and where == "end":
                _full()

        with pytest.raises(CheckpointError) as caught:
            write_step(out, 2, write, peers=peers)
        write_step(out, 3, lambda folder: (folder / f"{peers.rank}.json").write_text("{}"), peers=peers)
    return str(caught.value)


def _full():
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["files", "state", "end"])
def test_a_full_disk_on_one_rank_is_told_by_all(dense, tmp_path, two_ranks, where):
    """And nothing is left of it: whichever rank it is, whatever it was about to do, and the next save is written."""
    for failing in (0, 1):
        out = tmp_path / str(failing)
        messages = two_ranks.run(fail_in, dense, out, where, failing)
        assert all(f"rank {failing}: the disk is full" in message for message in messages)
        assert complete_steps(out) == [3]
        assert not list(out.glob(".step_*"))


def verify_damaged(folder):
    with open_peers() as peers, pytest.raises((CheckpointError, RankError)) as caught:
        verify_step(folder, peers)
    return str(caught.value)


def test_damage_is_found_by_whoever_reads_the_file(dense, tmp_path, two_ranks):
    two_ranks.run(save_run, dense, tmp_path, "shard")
    for file in sorted((tmp_path / "step_1").rglob("*.safetensors")):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert all(
            f"{file.name}: has changed" in message for message in two_ranks.run(verify_damaged, tmp_path / "step_1")
        )
        file.write_bytes(content)


def test_work_in_the_background_is_one_at_a_time_and_tells_its_error():
    order, background = [], Background()

    def work(name, error=None):
        order.append(f"{name} begins")
        os.sched_yield()
        if error:
            raise error
        order.append(f"{name} ends")

    background.run(lambda: work("a"))
    background.run(lambda: work("b", CheckpointError("full")))
    with pytest.raises(CheckpointError, match="full"):
        background.run(lambda: work("c"))
    background.wait()
    assert order == ["a begins", "a ends", "b begins"]
    assert not background.has_failed
