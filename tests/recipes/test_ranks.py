"""Several ranks on the CPU: the same numbers, and errors that end all of them."""

import subprocess
import sys

import pytest

from tests.recipes.conftest import ROWS, metrics_of
from tests.recipes.test_kill_and_resume import finish

SGD = ("optimizer=torch.optim.SGD", "optimizer.lr=0.1")


def command(checkpoint, out, *more, ranks=1):
    launch = ("--nproc_per_node", str(ranks)) if ranks > 1 else ()
    return [
        *(
            sys.executable,
            "-m",
            "torchtune.cli.tune",
            "run",
            *launch,
            "full_finetune",
            f"model_checkpoint={checkpoint}",
        ),
        *(f"dataset={ROWS}", f"output_dir={out}", "dtype=fp32", "max_seq_len=128", *SGD, *more),
    ]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("packed", ["true", "false"])
def test_two_ranks_equal_one(checkpoint, tmp_path, packed):
    """The same rows in the same steps: losses, norms and held-out losses agree to 1e-5 in fp32 (C049, C107)."""
    one, two = tmp_path / "one", tmp_path / "two"
    keys = (f"packed={packed}", "batch_size=3", "eval_fraction=0.2", "epochs=2")
    for arguments in (
        command(checkpoint, one, *keys, "gradient_accumulation_steps=2"),
        command(checkpoint, two, *keys, "gradient_accumulation_steps=1", ranks=2),
    ):
        done = finish(arguments)
        assert done.returncode == 0, done.stderr
    for line, other in zip(metrics_of(one), metrics_of(two), strict=True):
        assert line["tokens"] == other["tokens"]
        for key in ("loss", "grad_norm", "eval_loss"):
            assert other.get(key) == (pytest.approx(line[key], rel=1e-5) if key in line else None)


@pytest.mark.timeout(180)
def test_two_runs_at_once_do_not_meet(checkpoint, tmp_path):
    """C108: each launch finds a free port."""
    processes = [
        subprocess.Popen(
            command(checkpoint, tmp_path / name, "max_steps=1", ranks=2), stderr=subprocess.PIPE, text=True
        )
        for name in ("a", "b")
    ]
    for process in processes:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr


@pytest.mark.timeout(120)
def test_a_mistake_is_told_once_before_ranks_start(checkpoint, tmp_path):
    """The launcher validates first."""
    done = finish(command(checkpoint, tmp_path / "out", "epoch=3", ranks=2))
    assert done.returncode == 2
    assert done.stderr.count("did you mean 'epochs'?") == 1
