"""Threads and processes that read ahead: they change nothing, and none outlives its loop."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from made_samples import MadeSource, random_lengths

from torchtune.data.loader import DataLoader
from torchtune.data.plan import WindowSize
from torchtune.data.sampler import RowSampler
from torchtune.errors import DataError, TrainingError

LENGTHS = random_lengths(150, longest=32)


def loader(source=None, num_workers=0):
    source = source or MadeSource(LENGTHS, all_checked=False)
    return DataLoader(
        source,
        RowSampler(source.num_rows, seed=5),
        batch_size=2,
        gradient_accumulation_steps=2,
        max_seq_len=32,
        packed=True,
        seed=5,
        num_workers=num_workers,
        window=WindowSize(num_rows=40, num_tokens=10**6, first=20),
    )


def contents(data):
    return [[(batch.input_ids.tolist(), batch.rows) for batch in step] for step in data]


def nothing_is_left():
    """Whether no thread or process of a loader is there any more."""
    threads = [thread for thread in threading.enumerate() if thread.name == "torchtune-data"]
    return not threads and not worker_processes()


def worker_processes():
    """Those of loaders; ranks that other tests have started are left out."""
    return [process for process in multiprocessing.active_children() if process.name == "torchtune-data"]


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_the_number_of_workers_changes_nothing(num_workers):
    assert contents(loader(num_workers=num_workers)) == contents(loader())
    assert nothing_is_left()


def test_rows_in_memory_need_no_process():
    steps = iter(loader(MadeSource(LENGTHS), num_workers=2))
    next(steps)
    assert not worker_processes()
    steps.close()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("left_by", ["break", "error", "close", "with"])
def test_a_loop_that_is_left_early_leaves_nothing_behind(left_by, num_workers):
    data = loader(num_workers=num_workers)
    start = time.perf_counter()
    if left_by == "break":
        for _ in data:
            break
    elif left_by == "error":
        with pytest.raises(ZeroDivisionError):
            [1 / 0 for _ in data]
    elif left_by == "close":
        steps = iter(data)
        next(steps)
        data.close()
    else:
        with data:
            steps = iter(data)
            next(steps)
    assert nothing_is_left()
    assert time.perf_counter() - start < 20


def test_closing_does_not_wait_for_the_window():
    """The window that is being read would take a second more."""
    data = loader(MadeSource(LENGTHS, all_checked=False, seconds_per_row=0.05))
    steps = iter(data)
    next(steps)
    time.sleep(0.1)  # the thread has begun with the next window
    start = time.perf_counter()
    data.close()
    assert time.perf_counter() - start < 0.5
    assert nothing_is_left()


def test_a_closed_loader_can_be_iterated_again():
    data = loader()
    steps = iter(data)
    next(steps)
    data.close()
    assert contents(data) == contents(loader())


def test_two_loops_over_one_loader_do_not_mix():
    """They would share a place; the older one is told so, at once."""
    data = loader()
    older = iter(data)
    next(older)
    newer = iter(data)
    next(newer)
    place = data.state_dict()
    with pytest.raises(RuntimeError, match="iterated anew"):
        next(older)
    assert data.state_dict() == place
    newer.close()
    assert nothing_is_left()


def test_two_loaders_in_one_process_do_not_meet():
    first, second = loader(), loader(MadeSource(LENGTHS[:50], all_checked=False))
    together = [
        ([b.input_ids.tolist() for b in one], [b.input_ids.tolist() for b in other])
        for one, other in zip(first, second, strict=False)
    ]
    alone = loader(MadeSource(LENGTHS[:50], all_checked=False))
    assert [other for _, other in together] == [[b.input_ids.tolist() for b in step] for step in alone]
    first.close()
    assert nothing_is_left()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_row_in_a_worker_names_its_line(num_workers):
    """The same error at the same step, whoever reads; and every step before it was given out."""
    source = MadeSource(LENGTHS, all_checked=False)
    source.bad_row = int(RowSampler(150, seed=5).order()[100])
    seen = []
    with pytest.raises(DataError) as caught:
        seen.extend(loader(source, num_workers))
    assert (caught.value.source, caught.value.problem) == (f"made.jsonl:{source.bad_row + 1}", "not an object")
    windows_before = set(RowSampler(150, seed=5).order()[:80].tolist())  # windows of 20, 20, 40
    assert len(seen) == sum(all(row in windows_before for batch in step for row in batch.rows) for step in loader())
    assert nothing_is_left()


@dataclass
class DyingSource(MadeSource):
    """Takes its whole process down, as the kernel does when memory runs out."""

    def samples_of(self, row_index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_reported():
    with pytest.raises(TrainingError, match="exit code -9"):
        next(iter(loader(DyingSource(LENGTHS, all_checked=False), num_workers=1)))
    assert nothing_is_left()


def test_a_source_that_cannot_be_sent_is_refused():
    source = MadeSource(LENGTHS, all_checked=False)
    source.lock = threading.Lock()
    with pytest.raises(TrainingError, match="num_workers=0"):
        next(iter(loader(source, num_workers=1)))
    assert nothing_is_left()


SCRIPT = """
import multiprocessing, sys, time
from made_samples import MadeSource
from torchtune.data.loader import DataLoader
from torchtune.data.sampler import RowSampler

if __name__ == "__main__":
    source = MadeSource([[8]] * 5000, all_checked=False, seconds_per_row=0.001)
    data = DataLoader(source, RowSampler(5000, 0), batch_size=1, gradient_accumulation_steps=1,
                      max_seq_len=32, packed=True, seed=0, num_workers=2)
    steps = iter(data)
    next(steps)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    if sys.argv[1] == "wait":
        time.sleep(60)
"""


def run_script(tmp_path, what):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, script, what], stdout=subprocess.PIPE, text=True, env=environment)


def gone(pids, timeout_s=10.0):
    """Whether all of these processes end in time."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if not [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("what", ["wait", "leave"])
def test_workers_end_with_the_main_process(tmp_path, what):
    """Killed, or come to its end with a loop still open: no orphan keeps memory, and the end is not held up."""
    with run_script(tmp_path, what) as main:
        pids = [int(pid) for pid in main.stdout.readline().split()]
        if what == "wait":
            main.kill()
        assert main.wait(timeout=20) == (-signal.SIGKILL if what == "wait" else 0)
    assert len(pids) == 2
    assert gone(pids)
