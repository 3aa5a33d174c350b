"""Saves in the background: the same checkpoints, while training goes on."""

import threading
import time
from pathlib import Path

import pytest

from tests.recipes.conftest import ROWS, metrics_of
from torchtune.checkpoint.steps import complete_steps, verify_step
from torchtune.config.parse import parse_params
from torchtune.errors import CheckpointError
from torchtune.recipes import run_checkpoint
from torchtune.recipes.full_finetune import FullFinetuneParams, FullFinetuneRecipe
from torchtune.recipes.lora_finetune import LoRAFinetuneParams, LoRAFinetuneRecipe

RECIPES = {
    "full": (FullFinetuneParams, FullFinetuneRecipe),
    "lora": (LoRAFinetuneParams, LoRAFinetuneRecipe),
}


def run(name, source, out, *keys):
    params_class, recipe_class = RECIPES[name]
    common = ("max_steps=4", "save_every_n_steps=1", "keep_last=null", "max_seq_len=64", "dtype=fp32")
    params = parse_params(
        params_class, [f"model_checkpoint={source}", f"dataset={ROWS}", f"output_dir={out}", *common, *keys]
    )
    recipe = recipe_class(params=params)
    recipe.setup(params=params)
    recipe.train()
    recipe.cleanup()


def contents(out):
    """All that is in the checkpoints, but for what tells of times and of the runs' own keys."""
    return {
        str(file.relative_to(out)): file.read_bytes()
        for file in sorted(Path(out).glob("step_*/**/*"))
        if file.is_file() and file.name not in ("manifest.json", "state.json")
    }


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", RECIPES)
def test_checkpoints_are_those_of_saves_that_are_waited_for(checkpoint, tmp_path, name):
    """Each holds the weights and moments of its own step, though later steps have been made before it was written."""
    more = ("save_merged=true",) if name == "lora" else ("optimizer=torch.optim.AdamW",)
    run(name, checkpoint, tmp_path / "waits", *more)
    run(name, checkpoint, tmp_path / "goes_on", "enable_async_checkpointing=true", *more)
    assert complete_steps(tmp_path / "goes_on") == [1, 2, 3, 4]
    before, after = contents(tmp_path / "waits"), contents(tmp_path / "goes_on")
    assert before.keys() == after.keys()
    assert [key for key in before if before[key] != after[key]] == []


def two_ranks_in_background(checkpoint, out):
    run("full", checkpoint, out, "enable_async_checkpointing=true", "data_parallel_shard=2")


@pytest.mark.timeout(120)
def test_ranks_save_in_the_background_together(checkpoint, tmp_path, two_ranks):
    two_ranks.run(two_ranks_in_background, checkpoint, tmp_path)
    assert complete_steps(tmp_path) == [1, 2, 3, 4]
    for step in complete_steps(tmp_path):
        verify_step(tmp_path / f"step_{step}")


@pytest.mark.timeout(120)
def test_training_goes_on_and_never_two_are_written_at_once(checkpoint, tmp_path, monkeypatch):
    """A slow disk: the next step is made meanwhile, the next save waits, and the run ends when all is written."""
    write_step, running, overlaps, during = run_checkpoint.write_step, [], [], []

    def slowly(out, step, write, **options):
        overlaps.append(len(running))
        running.append(step)
        made = len(metrics_of(out))
        deadline = time.monotonic() + 10
        while step < 4 and len(metrics_of(out)) <= made and time.monotonic() < deadline:
            time.sleep(0.01)
        during.append(len(metrics_of(out)) - made)
        folder = write_step(out, step, write, **options)
        running.remove(step)
        return folder

    monkeypatch.setattr(run_checkpoint, "write_step", slowly)
    run("full", checkpoint, tmp_path, "enable_async_checkpointing=true")
    assert overlaps == [0, 0, 0, 0]
    assert during[:3] == [1, 1, 1]
    assert complete_steps(tmp_path) == [1, 2, 3, 4]
    assert not [thread for thread in threading.enumerate() if thread.name == "torchtune-save"]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("every", ["1", "3"])
def test_what_fails_is_told_at_the_next_step(checkpoint, tmp_path, monkeypatch, every):
    """Whether the next step would be saved or not; the failed save leaves nothing, and an earlier one stands."""
    write_step = run_checkpoint.write_step

    def fails(out, step, write, **options):
        def write_half(folder):
            write(folder)
            raise OSError(28, "No space left on device")

        return write_step(out, step, write_half if step == 3 else write, **options)

    monkeypatch.setattr(run_checkpoint, "write_step", fails)
    keys = (f"save_every_n_steps={every}", "enable_async_checkpointing=true", "max_steps=40", "epochs=20")
    with pytest.raises(CheckpointError, match="step_3: the disk is full"):
        run("full", checkpoint, tmp_path, *keys)
    assert complete_steps(tmp_path) == ([1, 2] if every == "1" else [])
    assert len(metrics_of(tmp_path)) < 10
