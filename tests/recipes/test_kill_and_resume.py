"""A run that is killed at any moment goes on to the same bits."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.recipes.conftest import ROWS, metrics_of

WITHOUT_TIME = ("step", "epoch", "loss", "lr", "grad_norm", "tokens", "trained_tokens", "eval_loss")


def command(checkpoint, out, *more):
    """A run of 15 steps over three epochs, with accumulation, that saves in every step."""
    return [
        *(sys.executable, "-m", "torchtune.cli.tune", "run", "full_finetune"),
        *(f"model_checkpoint={checkpoint}", f"dataset={ROWS}", f"output_dir={out}", "dtype=fp32"),
        *("max_seq_len=128", "gradient_accumulation_steps=2", "save_every_n_steps=1", "keep_last=3"),
        *("eval_fraction=0.1", "eval_every_n_steps=4", *more),
    ]


def finish(arguments, **options):
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False, **options)


def tensors_of(step):
    """The bytes of every tensor of a checkpoint, of the model and of what resuming needs, in whichever file."""
    return {
        (file.parent == step, file.stem.partition("-")[0], name): tensor.numpy().tobytes()
        for file in step.rglob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def same_end(one, two):
    """Models, optimizer states and metrics (times aside) are equal to the byte."""
    last = max(int(folder.name[5:]) for folder in one.glob("step_*"))
    tensors = [tensors_of(folder / f"step_{last}") for folder in (one, two)]
    assert tensors[0]
    assert tensors[0] == tensors[1]
    rows = [[{key: line.get(key) for key in WITHOUT_TIME} for line in metrics_of(out)] for out in (one, two)]
    assert rows[0] == rows[1]


@pytest.fixture(scope="module")
def unbroken(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "out"
    start = time.monotonic()
    done = finish(command(checkpoint, out))
    assert done.returncode == 0, done.stderr
    return out, time.monotonic() - start


@pytest.mark.parametrize("last", [1, 6, 7, 13])
def test_a_resumed_run_ends_at_the_same_bits(unbroken, checkpoint, tmp_path, last):
    """From the middle of an epoch, its end and its beginning."""
    whole, _ = unbroken
    out = tmp_path / "out"
    first = finish(command(checkpoint, out, "keep_last=null"), env=os.environ)
    assert first.returncode == 0, first.stderr
    for folder in out.glob("step_*"):
        if int(folder.name[5:]) > last:
            shutil.rmtree(folder)
    done = finish(command(checkpoint, out, "resume_from_checkpoint=true"))
    assert done.returncode == 0, done.stderr
    same_end(whole, out)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_twenty_times_at_random_moments(unbroken, checkpoint, tmp_path):
    """kill -9 of the process group, saves in progress included; each time the run goes on by `auto`."""
    whole, seconds = unbroken
    out = tmp_path / "out"
    rng = random.Random(0)
    kills = 0
    while kills < 20:
        if out.exists() and any(out.glob("step_15")):
            shutil.rmtree(out)  # finished in spite of the kills: begin again
        process = subprocess.Popen(
            command(checkpoint, out, "resume_from_checkpoint=auto"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(rng.uniform(0.3, 1.0) * seconds)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    done = finish(command(checkpoint, out, "resume_from_checkpoint=auto"))
    assert done.returncode == 0, done.stderr
    same_end(whole, out)
    assert not list(out.glob(".step_*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_saves_and_leaves(checkpoint, tmp_path, number):
    """The step is finished and saved; the status is 128 plus the signal, and the run goes on from there."""
    out = tmp_path / "out"
    arguments = [a for a in command(checkpoint, out, "epochs=400") if not a.startswith("save_every")]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number, stderr
    saved = max(out.glob("step_*"), key=lambda folder: int(folder.name[5:]))
    assert len(metrics_of(out)) == int(saved.name[5:])
    assert f"saved in {saved}" in stderr
    assert "Traceback" not in stderr


def test_a_resume_that_finds_nothing_is_refused(checkpoint, tmp_path):
    """C095: what was looked for and what is there."""
    done = finish(command(checkpoint, tmp_path / "out", "resume_from_checkpoint=true"))
    assert done.returncode == 2
    assert "it does not exist" in done.stderr
    done = finish(command(checkpoint, tmp_path / "out", f"resume_from_checkpoint={tmp_path}/step_7"))
    assert done.returncode == 2
    assert "step_7 is no checkpoint of a run" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_unreadable_checkpoint_is_not_resumed_from(unbroken, checkpoint, tmp_path):
    """A byte changed in the optimizer's state is told by its file, and nothing is trained."""
    out = tmp_path / "out"
    shutil.copytree(unbroken[0], out, symlinks=True)
    newest = max(out.glob("step_*"), key=lambda folder: int(folder.name[5:]))
    file = newest / "recipe_state" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    done = finish(command(checkpoint, out, "resume_from_checkpoint=true"))
    assert done.returncode != 0
    assert "optimizer.safetensors" in done.stderr
    assert "checksum" in done.stderr


def test_changed_keys_are_told_on_resume(checkpoint, tmp_path):
    """A key that alters the result is named with both values."""
    out = tmp_path / "out"
    finish(command(checkpoint, out, "max_steps=2"))
    done = finish(command(checkpoint, out, "max_steps=3", "resume_from_checkpoint=true"))
    assert done.returncode == 0, done.stderr
    assert "max_steps was 2 and is now 3" in done.stderr


def test_metrics_have_one_row_a_step_after_resume(unbroken):
    """C124: steps rise by one from 1."""
    assert [line["step"] for line in metrics_of(Path(unbroken[0]))] == list(range(1, 16))
