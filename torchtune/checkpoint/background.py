"""A thread that writes while training goes on, one piece of work at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs work in a thread; never two at once. What it raises is raised by the next `wait`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def has_failed(self) -> bool:
        """Whether the last work has raised; `wait` raises it."""
        return self._error is not None

    def run(self, work: Callable[[], None]) -> None:
        """Begin, once the work before is done.

        Raises: what the work before raised.
        """
        self.wait()
        self._thread = threading.Thread(target=self._work, args=(work,), name="torchtune-save", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is running.

        Raises: what the work raised, once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # raised again by `wait`
            self._error = error
