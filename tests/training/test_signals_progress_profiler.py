"""Signals are noted, the progress is shown, chosen steps are profiled."""

import io
import json
import os
import signal
import subprocess
import sys

import torch

from torchtune.training.profiler import setup_torch_profiler
from torchtune.training.progress import Progress, say
from torchtune.training.signals import StopSignals


def test_signals_are_noted_and_handlers_restored():
    """One SIGTERM asks to stop, SIGUSR1 asks to save once; afterwards all is as before."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with StopSignals() as signals:
        assert signals.stop_requested is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.take_save_request()
        assert not signals.take_save_request()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.stop_requested == signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_a_second_signal_leaves_at_once():
    """With status 128 plus its number, and a word."""
    code = (
        "import os, signal, time\n"
        "from torchtune.training.signals import StopSignals\n"
        "with StopSignals():\n"
        "    for _ in range(2):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 128 + signal.SIGINT
    assert "leaving now" in done.stderr


def test_plain_lines_in_a_log(capsys):
    """The first and the last step always, and few between."""
    with Progress(100) as progress:
        for step in range(1, 101):
            progress.update(step, {"loss": 1.0, "tokens_per_second": 5.0})
    shown = capsys.readouterr().err.splitlines()
    assert shown[0].startswith("step 1/100  loss 1.0000  5 tokens/s")
    assert shown[-1].startswith("step 100/100")
    assert len(shown) == 2


def test_what_an_encoding_lacks_is_escaped():
    """A sample with an emoji on an ASCII terminal."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    say("done 🙂", stream)
    assert stream.buffer.getvalue() == b"done \\U0001f642\n"


def test_chosen_steps_are_profiled(tmp_path):
    """A trace that a JSON reader takes, and a table of operators; off, nothing is written."""
    for enabled in (True, False):
        out = tmp_path / str(enabled)
        with setup_torch_profiler(
            enabled=enabled, output_dir=out, wait_steps=1, warmup_steps=1, active_steps=1
        ) as profiler:
            for _ in range(4):
                torch.ones(8, 8) @ torch.ones(8, 8)
                profiler.step()
        assert out.exists() == enabled
    (folder,) = (tmp_path / "True").iterdir()
    assert folder.name == "iteration_3"
    assert json.loads((folder / "rank0_trace.json").read_text())["traceEvents"]
    assert "aten::mm" in (folder / "rank0_top_operators.txt").read_text()
