"""Starting `tune run` as several processes, and looking after them."""

import socket
import subprocess
import sys
import time

TWO_MACHINES = ("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=test")


def start(arguments, **options):
    """The command, running; its errors are piped."""
    tune = [sys.executable, "-m", "torchtune.cli.tune", "run", *map(str, arguments)]
    return subprocess.Popen(tune, stderr=subprocess.PIPE, text=True, **options)


def finish(process):
    """Its exit status, and what it said."""
    _, stderr = process.communicate(timeout=120)
    return process.returncode, stderr


def children(process):
    """The process ids of an agent's ranks, those included that have ended and were not yet noticed."""
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        return [int(word) for word in file.read().split()]


def wait_for(condition, seconds=90):
    """Wait until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not come"
        time.sleep(0.05)


def free_port():
    """A port that nothing listens on."""
    with socket.create_server(("", 0)) as probe:
        return probe.getsockname()[1]


def is_listening(port):
    """Whether something does."""
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0
