"""Reading ahead of the loop: a thread that makes the next window, and processes that tokenise its rows.

Nothing read here depends on who read it: rows come in the order asked for, from one thread or many
processes. This file imports no torch, since each worker process imports it when it starts.
"""

from __future__ import annotations

import atexit
import pickle
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from torchtune.data.sample import Sample
from torchtune.errors import TrainingError

T = TypeVar("T")
CHUNK_ROWS = 16  # rows a worker is asked for at once: few enough to end soon, enough to outweigh the asking
_NO_MORE: Any = object()
CHUNKS_AHEAD = 2  # chunks that a worker may have before it: one to work at, one to go on with


class Source(Protocol):
    """Rows that give samples when asked."""

    @property
    def num_rows(self) -> int:
        """Rows of the data set."""

    @property
    def all_checked(self) -> bool:
        """Whether every sample is in memory."""

    def samples_of(self, row_index: int) -> list[Sample]:
        """The samples of one row, none or several; raises DataError for a row that can't be trained on."""


class Stopped(Exception):
    """Unwinds the thread that reads ahead; an early return could be taken for the end of the data."""


class Ahead(Generic[T]):
    """Iterates over what `make_items` gives, made by a thread that is `num_items` ahead.

    An error in the thread is raised when the item that it concerns is asked for. `close` ends the thread.

    Args:
        make_items: is given the event that says "stop"; raises Stopped some time after it is set.
    """

    def __init__(self, make_items: Callable[[threading.Event], Generator[T, None, None]], num_items: int) -> None:
        self._make_items = make_items
        self._stop = threading.Event()
        self._wanted = threading.Semaphore(num_items)
        # What is ready: an item, or the error or None that came instead of one.
        self._ready: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="torchtune-data", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        is_item, value = self._ready.get()
        if self._stop.is_set():
            raise RuntimeError("closed while an item was waited for")
        if is_item:
            self._wanted.release()
            return value
        self._ready.put((False, value))  # asked again, the answer is the same
        raise StopIteration if value is None else value

    def close(self) -> None:
        """End the thread and what it opened, without waiting for more than the row at work."""
        self._stop.set()
        self._wanted.release()
        if threading.current_thread() is not self._thread:  # it is, where this thread collects a forgotten loop
            self._thread.join()
        self._ready.put((False, None))  # for a loop that waits, or comes later

    def _run(self) -> None:
        end: BaseException | None = None
        try:
            items = self._make_items(self._stop)
            try:
                while self._wanted.acquire() and not self._stop.is_set():
                    if (item := next(items, _NO_MORE)) is _NO_MORE:
                        break
                    self._ready.put((True, item))
            finally:
                items.close()  # so that its own `finally` runs here, in the thread that it worked in
        except BaseException as error:  # handed to the loop, whatever it is
            end = error
        self._ready.put((False, end))


def read_samples(
    source: Source, rows: np.ndarray, stop: threading.Event, *, num_workers: int = 0
) -> Generator[list[Sample], None, None]:
    """The samples of each of `rows`, in that order, read in this thread or by `num_workers` processes."""
    if num_workers:
        yield from _read_by_processes(source, rows, stop, num_workers)
        return
    for row in rows:
        if stop.is_set():
            raise Stopped
        yield source.samples_of(int(row))


def _read_by_processes(
    source: Source, rows: np.ndarray, stop: threading.Event, num_workers: int
) -> Generator[list[Sample], None, None]:
    chunks = (rows[begin : begin + CHUNK_ROWS] for begin in range(0, len(rows), CHUNK_ROWS))
    workers = _start_workers(source, num_workers)
    try:
        asked: deque[_Worker] = deque()
        for worker in workers * CHUNKS_AHEAD:
            _ask(worker, chunks, asked)
        while asked:
            worker = asked.popleft()
            samples_by_row, error = worker.answer(stop)
            if error is None:
                _ask(worker, chunks, asked)  # in turn, so that answers come in the order of the rows
            yield from samples_by_row
            if error is not None:
                raise error
    finally:
        for worker in workers:
            worker.close()


def _start_workers(source: Source, num_workers: int) -> list[_Worker]:
    try:
        pickled = pickle.dumps(source)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        problem = f"this data source can't be sent to worker processes ({error}); use num_workers=0"
        raise TrainingError(problem) from error
    workers = [_Worker() for _ in range(num_workers)]
    for worker in workers:  # all have been started: they import side by side
        worker.send(pickled)
    return workers


def _ask(worker: _Worker, chunks: Iterator[np.ndarray], asked: deque[_Worker]) -> None:
    for rows in chunks:
        worker.send(rows.tolist())
        asked.append(worker)
        return


class _Worker:
    """A process that answers lists of row indices with their samples.

    A pipe of its own: when this process dies, however hard, the worker reads the pipe's end and leaves.
    """

    def __init__(self) -> None:
        # Spawned: a fork of a process with running threads may inherit a lock that nobody will release.
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), name="torchtune-data", daemon=True)
        self._process.start()
        theirs.close()
        # If the loop is still open when the interpreter ends: before multiprocessing waits for this process.
        atexit.register(self._process.kill)

    def send(self, message: bytes | list[int]) -> None:
        """Send the pickled source first, then chunks of row indices."""
        try:
            self._pipe.send(message)
        except OSError as error:
            raise self._ended() from error

    def answer(self, stop: threading.Event) -> tuple[list[list[Sample]], Exception | None]:
        """Samples of each row of the oldest chunk, up to the row that could not be read, and its error."""
        try:
            while not self._pipe.poll(0.05):
                if stop.is_set():
                    raise Stopped
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._ended() from error

    def close(self) -> None:
        """End the process."""
        atexit.unregister(self._process.kill)
        self._pipe.close()
        self._process.kill()  # it only reads: there is nothing that it could leave half done
        self._process.join()
        self._process.close()

    def _ended(self) -> TrainingError:
        self._process.join(1.0)
        return TrainingError(
            f"a data worker process ended with exit code {self._process.exitcode}; -9 means killed, most often "
            "for want of memory. A script that starts workers needs `if __name__ == '__main__':`. "
            "num_workers=0 reads in a thread instead"
        )


def _serve(pipe: Connection) -> None:
    """The worker process: answers until the other end is closed."""
    # These reach the whole group. The main process may want its next step before it saves and leaves;
    # it ends this one, and if it can't, the pipe's end does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    source: Source | None = None
    with suppress(EOFError, ConnectionError):  # the main process closed its end, or is gone
        pickled_source = pipe.recv()
        while True:
            rows = pipe.recv()
            samples_by_row: list[list[Sample]] = []
            error: Exception | None = None
            try:
                source = pickle.loads(pickled_source) if source is None else source
                for row in rows:
                    samples_by_row.append(source.samples_of(row))
            except Exception as raised:
                error = _portable(raised)
            pipe.send((samples_by_row, error))


def _portable(error: Exception) -> Exception:
    """`error` if it survives the way to the main process, else its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error
