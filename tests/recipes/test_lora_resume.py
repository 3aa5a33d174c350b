"""A run of lora_finetune that is killed at any moment goes on to the same bits."""

import json
import multiprocessing
import random
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.oracle import HEADS, SIZES
from tests.recipes.conftest import metrics_of
from tests.recipes.lora_runs import edited, export, keys_of, last_step, lora, lora_in_a_process
from tests.recipes.test_kill_and_resume import WITHOUT_TIME
from tests.tiny_checkpoint import save_tiny_checkpoint
from torchtune.cli.tune import run

pytestmark = pytest.mark.usefixtures("one_thread")
# Eight steps in two epochs, each of two micro-batches; all save.
EVERY_STEP = ("max_seq_len=128", "batch_size=1", "gradient_accumulation_steps=2", "max_steps=8", "save_every_n_steps=1")
LONG = (*EVERY_STEP, "keep_last=null", "eval_fraction=0.1", "eval_every_n_steps=3")
NF4 = "base_quantization=nf4"
KINDS = {
    "lora": ("lora_dropout=0.1",),
    "dora": ("use_dora=true", "use_rslora=true", "lora_dropout=0.1", "enable_activation_checkpointing=true"),
    "nf4": (NF4, "loraplus_lr_ratio=4"),
    "pissa": ("lora_init=pissa",),
    "nf4-pissa": (NF4, "lora_init=pissa", "lora_dropout=0.1"),
    "nf4-loftq": (NF4, "lora_init=loftq"),
    "int8-dora": ("base_quantization=int8", "use_dora=true"),
    "whole": ("modules_to_save=[lm_head, norm]", "lora_dropout=0.1"),
    "new-tokens": ("new_tokens=[<think>]", NF4),
    "bf16": ("param_dtype=bf16", "dtype=bf16", "modules_to_save=[norm]"),
    "fp16": ("dtype=fp16", "use_dora=true"),
    "experts": ("lora_targets=[attention, experts]",),
}
KILLED = ("lora", "dora", "nf4", "pissa", "nf4-pissa", "nf4-loftq", "whole")


@pytest.fixture(scope="session")
def mixture(tmp_path_factory):
    """A tiny Mixtral."""
    from transformers import MixtralConfig

    sizes = SIZES | HEADS | {"vocab_size": 400, "num_hidden_layers": 2, "num_local_experts": 4}
    return save_tiny_checkpoint(tmp_path_factory.mktemp("mixture") / "mixture", MixtralConfig(**sizes))


def same_adapter(one, two):
    """Adapter, config, optimizer state and metrics are equal to the byte; so is what else a run keeps of itself."""
    step = last_step(one).name
    for name in ("adapter_model.safetensors", "adapter_config.json", "recipe_state/optimizer.safetensors"):
        assert (one / step / name).read_bytes() == (two / step / name).read_bytes(), name
    states = [json.loads((out / step / "recipe_state" / "state.json").read_text()) for out in (one, two)]
    for state in states:
        del state["started"]
    assert states[0] == states[1]
    rows = [[{key: line.get(key) for key in WITHOUT_TIME} for line in metrics_of(out)] for out in (one, two)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_at_the_same_bits(checkpoint, mixture, tmp_path, kind):
    """From the first step, and from one of the second epoch that was evaluated."""
    base = mixture if kind == "experts" else checkpoint
    whole, out = tmp_path / "whole", tmp_path / "out"
    lora(base, whole, *LONG, *KINDS[kind])
    shutil.copytree(whole, out, symlinks=True)
    for last in (6, 1):
        for folder in out.glob("step_*"):
            if int(folder.name[5:]) > last:
                shutil.rmtree(folder)
        lora(base, out, *LONG, *KINDS[kind], "resume_from_checkpoint=true")
        same_adapter(whole, out)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", KILLED)
def test_killed_at_random_moments(checkpoint, tmp_path, kind):
    """kill -9 six times, saves in progress included; each time the run goes on by `auto`."""
    keys = (*EVERY_STEP, "eval_fraction=0.1", "eval_every_n_steps=3", *KINDS[kind])
    context = multiprocessing.get_context("forkserver")  # its processes need no time for imports
    context.set_forkserver_preload(["tests.recipes.lora_runs", "bitsandbytes"])

    def begin(out, *more):
        process = context.Process(target=lora_in_a_process, args=(checkpoint, out, *keys, *more))
        process.start()
        return process

    def seconds_of(out):
        start = time.monotonic()
        process = begin(out)
        process.join()
        assert process.exitcode == 0
        return time.monotonic() - start

    whole, out = tmp_path / "whole", tmp_path / "out"
    seconds_of(tmp_path / "first")  # what is loaded but once
    seconds = seconds_of(whole)
    rng, kills, saved = random.Random(kind), 0, set()
    while kills < 6:
        if (out / "step_8").exists():
            shutil.rmtree(out)  # finished in spite of the kills: begin again
        process = begin(out, "resume_from_checkpoint=auto")
        process.join(rng.uniform(0.2, 1.0) * seconds)
        if process.exitcode is None:
            process.kill()
            kills += 1
        process.join()
        assert process.exitcode in (0, -9)
        saved |= {folder.name for folder in out.glob("step_*")}
    was_killed_at_its_end = (out / "step_8").exists()
    process = begin(out, "resume_from_checkpoint=auto")
    process.join()
    assert process.exitcode == 0
    same_adapter(whole, out)
    # What a kill leaves half written or half removed is hidden, and goes with the next save.
    assert was_killed_at_its_end or not list(out.glob(".step_*"))
    assert saved, "each was killed before it had saved"


@pytest.fixture(scope="module")
def stopped(checkpoint, tmp_path_factory):
    """A run of two steps."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    lora(checkpoint, out, "max_steps=2")
    return out


def resume(base, out, *keys):
    return run(["run", "lora_finetune", *keys_of(base, out, "max_steps=3", "resume_from_checkpoint=true", *keys)])


def with_norm_changed(base, folder):
    """A base in which one number is another."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 0.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_case_c092_another_base_is_refused_by_name(checkpoint, stopped, tmp_path, capsys, monkeypatch):
    """One that differs in a norm, or in the weights of linear layers alone, as a base with an adapter merged does."""
    merged = export(tmp_path / "merged", f"model_checkpoint={checkpoint}", f"adapter={stopped}/step_2")
    monkeypatch.setattr("torchtune.recipes.adapters.SMALL", 100)  # the linear layers are large, as elsewhere
    small = tmp_path / "small"
    lora(checkpoint, small, "max_steps=2")
    for base in (with_norm_changed(checkpoint, tmp_path / "norm"), merged):
        before = {path: path.read_bytes() for path in small.rglob("*") if path.is_file()}
        assert resume(base, small) == 1
        said = capsys.readouterr().err
        assert f"step_2: was trained on other weights than {base} has now" in said
        assert {path: path.read_bytes() for path in small.rglob("*") if path.is_file()} == before
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    assert resume(moved, small) == 0


def test_case_c092_other_frozen_adapters_are_refused(checkpoint, stopped, tmp_path, capsys):
    """The same folder with other numbers in it."""
    below, out = edited(stopped / "step_2", tmp_path / "below"), tmp_path / "out"
    lora(checkpoint, out, "max_steps=2", f"frozen_adapters=[{below}]")
    tensors = load_file(below / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] += 0.5
    save_file(tensors, below / "adapter_model.safetensors")
    assert resume(checkpoint, out, f"frozen_adapters=[{below}]") == 1
    assert "over other frozen_adapters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("lora_rank=5",), ["lora_rank was 4 and is now 5", "is (4, 64), and this run's (5, 64)"]),
        (("lora_targets=attention",), ["an update of 'model.layers.0.mlp.down_proj', which this run does not train"]),
        (("lora_rank=8", "lora_init=pissa"), ["lora_init", "pissa"]),
        (("use_dora=true",), ["has a magnitude (DoRA) in one of adapter and run"]),
        (("modules_to_save=[norm]",), ["nothing of 'model.norm.weight', which this run trains"]),
        (("new_tokens=[<think>]",), ["was trained on other weights"]),
    ],
)
def test_keys_that_make_another_adapter_are_refused_on_resume(checkpoint, stopped, capsys, keys, said):
    """By what does not fit, and nothing is written."""
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    assert resume(checkpoint, stopped, *keys) in (1, 2)
    told = capsys.readouterr().err
    assert all(text in told for text in said), told
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_case_c092_a_key_that_does_not_match_is_an_error(checkpoint, stopped, tmp_path, capsys):
    """A layer's name changed in the adapter's file, with the manifest of a file that is whole: no fresh layer is put in."""
    out = shutil.copytree(stopped, tmp_path / "out")
    folder = out / "step_2"
    file = folder / "adapter_model.safetensors"
    tensors = {name.replace("layers.1.mlp.up_proj", "layers.1.mlp.up_porj"): t for name, t in load_file(file).items()}
    save_file(tensors, file)
    manifest = json.loads((folder / "manifest.json").read_text())
    import hashlib

    entry = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    manifest["files"]["adapter_model.safetensors"] = entry
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert resume(checkpoint, out) == 1
    assert "an update of 'model.layers.1.mlp.up_porj', and this model no such layer; did you mean" in (
        capsys.readouterr().err
    )


def test_changed_scales_are_told(checkpoint, stopped, tmp_path, capsys):
    """Another alpha trains on, and says that the run is another."""
    out = shutil.copytree(stopped, tmp_path / "out")
    assert resume(checkpoint, out, "lora_alpha=8", "lora_dropout=0.1") == 0
    told = capsys.readouterr().err
    assert "lora_alpha was 32.0 and is now 8.0" in told
    assert "lora_dropout was 0.0 and is now 0.1" in told


def test_the_resumed_adapter_is_the_file_and_the_base_the_original(checkpoint, stopped, tmp_path):
    """C092: a step at a rate of 0 writes the adapter that was read, byte for byte; nothing is merged on the way."""
    out = shutil.copytree(stopped, tmp_path / "out")
    keys = ("optimizer.lr=0.0", "param_groups=[]", "save_merged=true")
    assert resume(checkpoint, out, *keys) == 0
    before, after = (load_file(out / step / "adapter_model.safetensors") for step in ("step_2", "step_3"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_pissa_run_goes_on_as_one(checkpoint, tmp_path, capsys):
    """Its file has twice the rank and would fit a plain run of that rank, over a base with nothing taken out."""
    out = tmp_path / "out"
    lora(checkpoint, out, "lora_init=pissa", "max_steps=1")
    assert resume(checkpoint, out, "lora_init=default", "lora_rank=8", "max_steps=2") == 2
    assert "'default', and the run began with 'pissa'" in capsys.readouterr().err
    assert not (out / "step_2").exists()
