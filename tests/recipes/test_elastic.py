"""A run of several ranks that loses one of them, is asked to stop, or spans machines."""

import contextlib
import os
import random
import signal
import time

import pytest

from tests.launching import TWO_MACHINES, children, finish, free_port, start, wait_for
from tests.recipes.conftest import metrics_of
from tests.recipes.test_kill_and_resume import command, same_end

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
TWO_RANKS = ("--nproc_per_node", "2")


def run(checkpoint, out, *more, flags=TWO_RANKS, cwd=None):
    """The run of test_kill_and_resume.py, by an agent; without `out`, in the folder of its own choice."""
    keys = command(checkpoint, out, *more)[4:]
    keys = keys if out else [key for key in keys if not key.startswith("output_dir")]
    return start([*flags, *keys], cwd=cwd, env=ONE_THREAD)


@pytest.fixture(scope="module")
def unhurt(checkpoint, tmp_path_factory):
    """The folder of a run of two ranks, and how long they ran."""
    out = tmp_path_factory.mktemp("unhurt") / "out"
    process = run(checkpoint, out)
    wait_for(lambda: children(process))
    begin = time.monotonic()
    code, stderr = finish(process)
    assert code == 0, stderr
    return out, time.monotonic() - begin


def kill_one(agent, rng):
    """kill -9 of a rank, if the run has not ended; returns when its agent has ended all of them."""
    if ranks := set(children(agent)) if agent.poll() is None else ():
        with contextlib.suppress(ProcessLookupError):  # it has ended just now
            os.kill(rng.choice(sorted(ranks)), signal.SIGKILL)
        wait_for(lambda: agent.poll() is not None or not ranks & set(children(agent)))


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "seed", [0, 1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_a_run_whose_ranks_are_killed_ends_at_the_same_bits(unhurt, checkpoint, tmp_path, seed):
    """kill -9 of one rank, twice, at random moments, before the first checkpoint too; it goes on by itself."""
    whole, seconds = unhurt
    rng = random.Random(seed)
    process = run(checkpoint, None, flags=(*TWO_RANKS, "--max_restarts", "2"), cwd=tmp_path)
    for _ in range(2):
        wait_for(lambda: process.poll() is not None or len(children(process)) == 2)
        time.sleep(rng.uniform(0.2, 1.0) * seconds)
        kill_one(process, rng)
    code, stderr = finish(process)
    assert code == 0, stderr
    assert "Traceback" not in stderr
    (out,) = (tmp_path / "runs").iterdir()  # all attempts wrote to the same one
    same_end(whole, out)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("number", "also_ranks"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_a_stop_signal_saves_once_and_ends_all(checkpoint, tmp_path, number, also_ranks):
    """To the agent, as Ctrl-C; or to every process at once, as clusters do, which is one wish and not two."""
    out = tmp_path / "out"
    process = run(checkpoint, out, "epochs=400", "save_every_n_steps=100000", flags=(*TWO_RANKS, "--max_restarts", "2"))
    wait_for(lambda: (out / "metrics.jsonl").exists())
    for pid in [*(children(process) if also_ranks else ()), process.pid]:
        os.kill(pid, number)
    code, stderr = finish(process)
    assert code == 128 + number, stderr
    (saved,) = out.glob("step_*")
    assert len(metrics_of(out)) == int(saved.name[5:])
    assert stderr.count(f"saved in {saved}") == 1
    assert "Traceback" not in stderr
    assert "rank" not in stderr


@pytest.mark.timeout(180)
def test_two_machines_equal_one(unhurt, checkpoint, tmp_path):
    """Two agents that meet at a port; one rank of all writes files, and each message comes once."""
    out = tmp_path / "out"
    flags = (*TWO_MACHINES, f"--rdzv_endpoint=localhost:{free_port()}")
    ended = [finish(process) for process in [run(checkpoint, out, flags=flags) for _ in range(2)]]
    said = "".join(stderr for _, stderr in ended)
    assert [code for code, _ in ended] == [0, 0], said
    same_end(unhurt[0], out)
    last = metrics_of(out)[-1]["step"]
    assert said.count(f"{out}: seed") == 1
    assert said.count(f"step {last}/{last}") == 1
