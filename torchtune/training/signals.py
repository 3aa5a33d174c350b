"""Being asked to stop, or to save: noted when the signal comes, acted on between two steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from torchtune.distributed.process_group import is_main, launched

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Under a launcher one wish comes twice where the cluster signals every process: the agent passes its own on.
SECONDS_OF_ONE_WISH = 5.0


class StopSignals:
    """Within this context, SIGINT and SIGTERM ask the loop to save and leave; a second one leaves at once.

    SIGUSR1 asks for a checkpoint. The handlers before are restored on leaving. Outside the main thread
    Python gives no signals, so nothing is handled there.

    Attributes:
        stop_requested: the signal that asked to stop, or None.
    """

    def __init__(self) -> None:
        self.stop_requested: int | None = None
        self._stop_time = 0.0
        self._save_requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._before[number] = signal.signal(number, self._on_stop)
            if hasattr(signal, "SIGUSR1"):
                self._before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._on_save)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def take_save_request(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        requested, self._save_requested = self._save_requested, False
        return requested

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.stop_requested is not None:
            if launched() and time.monotonic() - self._stop_time < SECONDS_OF_ONE_WISH:
                return
            # Straight to the descriptor: the handler may have interrupted a write to sys.stderr.
            os.write(2, f"\n{name} again: leaving now; the last complete checkpoint stands\n".encode())
            os._exit(128 + number)
        self.stop_requested, self._stop_time = number, time.monotonic()
        if is_main():
            os.write(2, f"\n{name}: finishing this step, saving, then leaving; once more leaves at once\n".encode())

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self._save_requested = True
