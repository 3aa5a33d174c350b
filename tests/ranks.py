"""Several gloo ranks for tests: processes that are started once and then given one function after the other."""

import gc
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

START_TIMEOUT_S = 180


class RankPool:
    """So many ranks, each with one thread. A function that hangs fails its test, and the next one gets new ranks."""

    def __init__(self, num_ranks):
        self.num_ranks = num_ranks
        self._workers = []

    def run(self, function, *args, timeout_s=60):
        """Call `function(*args)` on every rank; it must be found by its module's name. Returns the results by rank.

        The processes go on with other tests: what the function sets in a module it must set back.

        Raises:
            AssertionError: it raised on a rank, or did not end in time; says what it said.
        """
        if not self._workers:
            self._start()
        for _, pipe in self._workers:
            pipe.send((function, args))
        deadline = time.monotonic() + timeout_s
        answers = []
        for rank, (process, pipe) in enumerate(self._workers):
            if not pipe.poll(max(deadline - time.monotonic(), 1.0 if answers else 0)):
                state = "still runs" if process.is_alive() else f"ended with {process.exitcode}"
                answers.append((False, f"rank {rank} gave no answer within {timeout_s} s ({state})"))
                continue
            try:
                answers.append(pipe.recv())
            except EOFError:
                answers.append((False, f"rank {rank} ended with {process.exitcode}"))
        if failures := [f"rank {rank}: {answer}" for rank, (done, answer) in enumerate(answers) if not done]:
            self.close()  # its ranks no longer stand at the same place
            raise AssertionError("\n".join(failures))
        return [answer for _, answer in answers]

    def close(self):
        """End the processes."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers = []

    def _start(self):
        context = mp.get_context("spawn")
        store = Path(tempfile.mkdtemp()) / "store"
        for rank in range(self.num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.num_ranks, str(store), theirs), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        # Ranks that only just begin are not those of a test that hangs: on a busy machine it takes them a minute.
        for process, pipe in self._workers:
            if not pipe.poll(START_TIMEOUT_S):
                self.close()
                raise AssertionError(f"{process.name} did not begin within {START_TIMEOUT_S} s")
            pipe.recv()


def _work(rank, num_ranks, store, pipe):
    torch.set_num_threads(1)
    # Else each rank that compiles starts processes of its own to do so, which all load torch first.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
    pipe.send("ready")
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, function(*args))
        except BaseException:  # the test shows it
            answer = (False, traceback.format_exc())
        # Models hold their process groups, in circles, and compiled code its models; a gloo group that nobody needs
        # wakes up all the time.
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        gc.collect()
        pipe.send(answer)
