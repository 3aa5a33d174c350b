"""`tune run --nproc_per_node ...`: what is refused before processes start, and how several processes end."""

import os
import signal
import socket
import textwrap
import time

import pytest

from tests.launching import TWO_MACHINES, children, finish, free_port, is_listening, start, wait_for
from tests.tiny_checkpoint import save_tiny_checkpoint
from torchtune.cli import agent
from torchtune.cli.tune import call
from torchtune.distributed.process_group import world_size
from torchtune.errors import ConfigError

pytestmark = pytest.mark.usefixtures("kept_environment")
HEADER = """
import os, signal, sys, time, torch
import torch.distributed as dist
from torchtune.distributed.attempts import is_restarted, launched_at
from torchtune.distributed.process_group import barrier, process_group, rank
from torchtune.errors import ConfigError, DataError

def note(text):
    with open(f"rank{rank()}.txt", "a") as file:
        file.write(f"{text}\\n")

"""


@pytest.fixture
def job(tmp_path):
    """Write a script, and start it as several processes; the command ends up in `finish`."""

    def run(body, *flags):
        script = tmp_path / "job.py"
        groups = [textwrap.indent(textwrap.dedent(part), "    ") for part in body.split("--- the next group ---")]
        script.write_text(HEADER + "".join(f'with process_group("cpu"):\n{group}\n' for group in groups))
        return start([*flags, script], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})

    return run


def noted(folder):
    """The lines of each rank."""
    return [file.read_text().splitlines() for file in sorted(folder.glob("rank*.txt"))]


@pytest.mark.parametrize(
    ("flags", "key", "said"),
    [
        (["--nproc_per_node", "0"], "--nproc_per_node", "0 is no number of processes"),
        (["--nproc-per-node=many"], "--nproc_per_node", "auto, cpu or gpu"),
        (["--nnodes", "two"], "--nnodes", "N, or MIN:MAX"),
        (["--nnodes=2:1"], "--nnodes", "N, or MIN:MAX"),
        (["--nnodes", "2"], "--nnodes", "--rdzv_endpoint HOST:PORT"),
        (["--standalone", "--nnodes", "2"], "--nnodes", "--rdzv_endpoint HOST:PORT"),
        (["--nproc_per_node", "2", "--max-restarts", "-1"], "--max_restarts", "less than none"),
        (["--nproc_per_node", "2", "-m"], "--module", "name the recipe alone"),
    ],
)
def test_a_wrong_flag_is_refused_by_name(flags, key, said):
    """In either spelling, and with what to write."""
    with pytest.raises(ConfigError) as caught:
        call(["run", *flags, "full_finetune"])
    assert caught.value.problems[0].key == key
    assert said in caught.value.problems[0].message


@pytest.mark.parametrize("flags", ["--master_port=%d", "--rdzv_backend=c10d --rdzv_endpoint=localhost:%d"])
def test_case_c108_a_port_in_use_is_refused_at_once(flags):
    """With the port, and the flag that gave it."""
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} can't be had") as caught:
            call(["run", "--nproc_per_node", "2", *(flags % port).split(), "full_finetune"])
    assert caught.value.problems[0].key in ("--master_port", "--rdzv_endpoint")


CHECKED = """
from torchtune.distributed.process_group import rank, world_size
from torchtune.distributed.process_group import broadcast_object
from pydantic.dataclasses import dataclass

@dataclass
class CheckedParams:
    pass

def check(params):
    raise SystemExit(f"{rank()} of {world_size()}, {broadcast_object('alone')}")

def main():
    pass
"""


@pytest.mark.parametrize(
    ("flags", "num_ranks"),
    [(["--nproc_per_node=3"], 3), (["--nnodes=2:4", "--nproc-per-node=2", "--rdzv_endpoint=a:1"], 4)],
)
def test_options_are_validated_for_the_ranks_to_come(tmp_path, monkeypatch, flags, num_ranks):
    """The number is known while nothing has started, also where a cluster has numbered its pods; then it is gone."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "7")
    (tmp_path / "checked.py").write_text(CHECKED)
    with pytest.raises(SystemExit, match=f"0 of {num_ranks}, alone"):
        call(["run", *flags, str(tmp_path / "checked.py")])
    assert world_size() == 1


def test_help_comes_once(capsys, monkeypatch):
    """From this process, not from each that would be started."""
    monkeypatch.setattr(agent, "launch", None)
    with pytest.raises(SystemExit):
        call(["run", "--nproc_per_node", "2", "full_finetune", "--help"])
    assert "model_checkpoint" in capsys.readouterr().out


@pytest.mark.timeout(180)
def test_what_would_only_fail_again_is_not_tried_again(job, tmp_path):
    """One rank's bad row: told once, by it, with its status; no other attempt, and no word of the other's end."""
    code, stderr = finish(
        job(
            """
            note("start")
            if rank() == 1:
                raise DataError("a bad row", source="data.jsonl:3")
            barrier()
            """,
            *("--nproc_per_node", "2", "--max_restarts", "3"),
        )
    )
    assert code == 1
    assert noted(tmp_path) == [["start"], ["start"]]
    assert stderr.splitlines() == [
        "data.jsonl:3: a bad row",
        "rank 1 failed first, with exit status 1; its message is above",
    ]


@pytest.mark.timeout(180)
def test_any_other_end_is_tried_again(job, tmp_path):
    """A crash, then a kill: the third attempt is told that it is one, and has the first one's time of launch."""
    code, stderr = finish(
        job(
            """
            note(f"{is_restarted()} {launched_at()}")
            attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
            barrier()
            if attempt == 0 and rank() == 1:
                raise RuntimeError("the cable is out")
            if attempt == 1 and rank() == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            barrier()
            """,
            *("--nproc_per_node", "2", "--max_restarts", "2"),
        )
    )
    assert code == 0, stderr
    lines = noted(tmp_path)
    assert lines[0] == lines[1]
    assert [line.split()[0] for line in lines[0]] == ["False", "True", "True"]
    assert len({line.split()[1] for line in lines[0]}) == 1
    assert stderr.count("RuntimeError: the cable is out") == 1
    assert "with exit status 1; its message is above; starting all again (1 of 2 restarts left)" in stderr
    assert "rank 0 was ended by SIGKILL; starting all again (0 of 2 restarts left)" in stderr
    assert "gloo" not in stderr


@pytest.mark.timeout(180)
def test_one_group_after_the_other(job, tmp_path):
    """Several stages in one script: the second group is not told the first one's addresses."""
    body = """
    barrier()
    --- the next group ---
    barrier()
    note("met again")
    """
    code, stderr = finish(job(body, "--nproc_per_node", "2"))
    assert code == 0, stderr
    assert noted(tmp_path) == [["met again"]] * 2


@pytest.mark.timeout(180)
def test_what_a_program_leaves_for_its_end_is_done(job, tmp_path):
    """Threads run out, and what was registered is called, as trackers need it; the status is the program's own."""
    code, stderr = finish(
        job(
            """
            import atexit, threading
            atexit.register(note, "registered")
            threading.Thread(target=lambda: (time.sleep(1), note("thread"))).start()
            sys.exit(7)
            """,
            *("--nproc_per_node", "1"),
        )
    )
    assert code == 7, stderr
    assert noted(tmp_path) == [["thread", "registered"]]


@pytest.mark.timeout(180)
def test_what_is_wrong_on_all_ranks_is_told_once(job):
    """And its status is that of a wrong option."""
    code, stderr = finish(job('raise ConfigError("no such thing", key="thing")', "--nproc_per_node", "3"))
    assert code == 2
    assert stderr.count("thing: no such thing") == 1


@pytest.mark.timeout(180)
def test_ranks_that_hang_end_when_one_has_ended(job):
    """Whether they wait for it in a collective or are lost in work of their own; the status is the killed one's."""
    start = time.monotonic()
    code, stderr = finish(
        job(
            """
            if rank() == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            elif rank() == 1:
                time.sleep(1000)
            barrier()
            """,
            *("--nproc_per_node", "3"),
        )
    )
    assert code == 128 + signal.SIGKILL
    assert stderr.splitlines() == ["rank 2 was ended by SIGKILL"]
    assert time.monotonic() - start < 60


@pytest.mark.timeout(180)
def test_a_wish_to_save_reaches_every_rank(job, tmp_path):
    """SIGUSR1 to the agent; ranks that are not ready for it yet are not ended by it."""
    process = job(
        """
        from torchtune.training.signals import StopSignals
        note("up")
        while not os.path.exists("go"):
            time.sleep(0.05)
        with StopSignals() as signals:
            note("ready")
            while not signals.take_save_request():
                time.sleep(0.05)
            note("asked")
        """,
        *("--nproc_per_node", "2"),
    )
    wait_for(lambda: noted(tmp_path) == [["up"], ["up"]])
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.5)
    (tmp_path / "go").touch()
    wait_for(lambda: noted(tmp_path) == [["up", "ready"]] * 2)
    process.send_signal(signal.SIGUSR1)
    code, stderr = finish(process)
    assert code == 0, stderr
    assert noted(tmp_path) == [["up", "ready", "asked"]] * 2


@pytest.mark.timeout(180)
def test_an_error_on_one_machine_ends_the_other(job, tmp_path):
    """In seconds though it could start again, and the error is told on its machine alone."""
    flags = (*TWO_MACHINES, f"--rdzv_endpoint=localhost:{free_port()}", "--max_restarts=3")
    body = """
    note("start")
    barrier()
    if rank() == 1:
        raise DataError("a bad row")
    barrier()
    """
    ended = [finish(process) for process in [job(body, *flags), job(body, *flags)]]
    assert [code for code, _ in ended] == [1, 1]
    assert noted(tmp_path) == [["start"], ["start"]]
    assert sum(stderr.count("a bad row") for _, stderr in ended) == 1
    assert all("Traceback" not in stderr for _, stderr in ended)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_machine_that_is_lost_and_comes_back_is_taken_in(job, tmp_path):
    """Its new agent counts no restart of its own, yet all ranks know that the run goes on."""
    port = free_port()
    flags = (
        *TWO_MACHINES,
        f"--rdzv_endpoint=localhost:{port}",
        "--max_restarts=3",
        "--rdzv_conf=keep_alive_interval=1",
    )
    body = """
    note(f"{is_restarted()}")
    if not is_restarted():
        barrier()
        time.sleep(1000)
    barrier()
    """
    stays = job(body, *flags)
    wait_for(lambda: is_listening(port))
    lost = job(body, *flags)
    wait_for(lambda: len(noted(tmp_path)) == 2)
    time.sleep(1)
    for pid in [lost.pid, *children(lost)]:
        os.kill(pid, signal.SIGKILL)
    lost.wait()
    back = job(body, *flags)
    for process in (stays, back):
        code, stderr = finish(process)
        assert code == 0, stderr
    assert all(lines[-1] == "True" for lines in noted(tmp_path))


@pytest.mark.timeout(180)
def test_an_error_that_follows_from_another_is_neither_told_nor_final(job):
    """Rank 1's is; rank 0 only reports that it is gone, in an error of ours, and would not stop a restart."""
    code, stderr = finish(
        job(
            """
            attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
            barrier()
            if attempt == 0 and rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                barrier()
            except RuntimeError as error:
                raise DataError("a file of rank 1 is missing") from error
            """,
            *("--nproc_per_node", "2", "--max_restarts", "1"),
        )
    )
    assert code == 0, stderr
    assert stderr.splitlines() == ["rank 1 was ended by SIGKILL; starting all again (0 of 1 restarts left)"]


def test_validate_plans_for_the_ranks_that_the_flags_say(tmp_path, capsys):
    source = save_tiny_checkpoint(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}')
    keys = [f"model_checkpoint={source}", f"dataset={rows}", f"output_dir={tmp_path / 'out'}"]
    assert call(["validate", "--nproc_per_node", "2", "full_finetune", *keys, "tensor_parallel=2"]) == 0
    with pytest.raises(ConfigError, match="one process can split nothing, or start as many as there are places"):
        call(["validate", "full_finetune", *keys, "tensor_parallel=2"])
    with pytest.raises(ConfigError, match=r"3 does not divide the number of processes, 4: .* \(1, 2, 4\)"):
        call(["run", "--nproc_per_node", "4", "full_finetune", *keys, "tensor_parallel=3"])


def test_a_flag_behind_the_recipe_is_told_where_it_goes():
    with pytest.raises(ConfigError, match="goes before the recipe: tune run --nproc_per_node 2 RECIPE"):
        call(["run", "full_finetune", "--nproc_per_node", "2"])


def test_a_flag_that_is_cut_short_is_refused():
    with pytest.raises(SystemExit):
        call(["run", "--nproc-per-nod", "2", "full_finetune"])
