"""A checkpoint of a run is whole or absent."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from torchtune.checkpoint.steps import complete_steps, mark_best, newest_step, prune_steps, verify_step, write_step
from torchtune.checkpoint.training_state import (
    load_optimizer_tensors,
    load_training_state,
    optimizer_tensors,
    save_training_state,
)
from torchtune.errors import CheckpointError


def write(folder):
    (folder / "config.json").write_text("{}")
    (folder / "recipe_state").mkdir()
    save_file({"x": torch.arange(1000.0)}, folder / "recipe_state" / "x.safetensors")


def test_written_found_verified_pruned(tmp_path):
    """The newest K stay, and what is to be kept besides."""
    for step in (2, 10, 30, 40):
        verify_step(write_step(tmp_path, step, write))
    assert complete_steps(tmp_path) == [2, 10, 30, 40]
    assert newest_step(tmp_path) == tmp_path / "step_40"
    mark_best(tmp_path, 2)
    prune_steps(tmp_path, 1, keep=[2])
    assert complete_steps(tmp_path) == [2, 40]
    assert (tmp_path / "best" / "config.json").exists()
    prune_steps(tmp_path, None)
    assert complete_steps(tmp_path) == [2, 40]


def test_files_are_as_readable_as_their_folder(tmp_path):
    """A server of another user reads them where the umask lets it."""
    step = write_step(tmp_path, 1, lambda folder: save_file({"a": torch.zeros(1)}, folder / "model.safetensors"))
    assert {file.stat().st_mode & 0o777 for file in step.iterdir()} == {step.stat().st_mode & 0o666}


@pytest.mark.parametrize("harm", ["missing", "cut", "changed"])
def test_a_damaged_checkpoint_is_told_by_file(tmp_path, harm):
    """Missing or cut files make it incomplete; a changed byte is found by its checksum."""
    folder = write_step(tmp_path, 1, write)
    file = folder / "recipe_state" / "x.safetensors"
    if harm == "missing":
        file.unlink()
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert complete_steps(tmp_path) == ([1] if harm == "changed" else [])
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        verify_step(folder)


def test_a_write_that_fails_leaves_nothing_and_touches_nothing(tmp_path):
    """A full disk in the middle: a clear error, the earlier checkpoint untouched."""
    write_step(tmp_path, 1, write)

    def full(folder):
        write(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"step_2: the disk is full .* lower keep_last"):
        write_step(tmp_path, 2, full)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_1"]
    verify_step(tmp_path / "step_1")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_really_full_disk(tmp_path):
    """A file system of 64 KB."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], check=False)
    if mounted.returncode:
        pytest.skip("this machine does not let tests mount")
    try:
        with pytest.raises(CheckpointError, match="the disk is full"):
            write_step(tmp_path, 1, lambda folder: save_file({"x": torch.zeros(10**6)}, folder / "x.safetensors"))
        assert complete_steps(tmp_path) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)


KILLED = """
import sys, time
from pathlib import Path
import torch
from safetensors.torch import save_file
from torchtune.checkpoint.steps import write_step
def write(folder):
    for name in "abcd":
        save_file({"x": torch.zeros(10**6)}, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text("{}")
step = 0
while True:
    step += 1
    write_step(Path(sys.argv[1]), step % 3, write)
    print(step, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.013, 0.029, 0.051])
def test_killed_while_writing(tmp_path, delay):
    """Whatever stands under a step's name is whole."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for folder in tmp_path.glob("step_*"):
        verify_step(folder)
    write_step(tmp_path, 9, write)
    assert not list(tmp_path.glob(".step_*"))


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_returns_to_the_bit(tmp_path, name):
    """Saved, loaded into a new optimizer, and stepped: equal to one that never stopped."""

    def make():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 2))
        return model, OPTIMIZERS[name](model.parameters()), {p: n for n, p in model.named_parameters()}

    def step(model, optimizer, k):
        torch.manual_seed(k)
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer, names = make()
    for k in range(3):
        step(model, optimizer, k)
    tensors, others = optimizer_tensors(optimizer, names)
    save_training_state(tmp_path, {"optimizer": tensors}, {"optimizer": others})
    json.loads((tmp_path / "recipe_state" / "state.json").read_text())
    other, restored, other_names = make()
    other.load_state_dict(model.state_dict())
    state = load_training_state(tmp_path)
    load_optimizer_tensors(restored, other_names, state.tensors.get("optimizer", {}), state.state["optimizer"])
    for k in range(3, 6):
        step(model, optimizer, k)
        step(other, restored, k)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_state_of_another_model_is_refused():
    """A key that matches nothing is an error, never skipped."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    names = {parameter: name for name, parameter in model.named_parameters()}
    with pytest.raises(CheckpointError, match=r"'exp_avg/other\.weight'"):
        load_optimizer_tensors(optimizer, names, {"exp_avg/other.weight": torch.zeros(2, 2)}, {})
    with pytest.raises(CheckpointError, match="nothing of 'bias'"):
        load_optimizer_tensors(optimizer, names, {"exp_avg/weight": torch.zeros(2, 2)}, {})


def test_optimizer_state_of_another_shape_is_refused():
    """A fused step would read and write beyond its end."""

    def trained(size):
        model = torch.nn.Linear(size, 3)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(2, size)).sum().backward()
        optimizer.step()
        return optimizer, {parameter: name for name, parameter in model.named_parameters()}

    tensors, others = optimizer_tensors(*trained(4))
    with pytest.raises(CheckpointError, match=r"exp_avg/weight' \(3, 4\), but 'weight' is \(3, 8\)"):
        load_optimizer_tensors(*trained(8), tensors, others)


def test_a_copied_best_is_moved_aside(tmp_path):
    """Copying a run by `cp -L` makes a folder of the link: it is kept, and the next best is marked."""
    for step in (1, 2):
        write_step(tmp_path, step, write)
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "kept").write_text("")
    mark_best(tmp_path, 2)
    assert (tmp_path / "best").resolve() == (tmp_path / "step_2").resolve()
    assert [entry.parent.name.startswith("best.copied-") for entry in tmp_path.glob("best.copied-*/kept")] == [True]
