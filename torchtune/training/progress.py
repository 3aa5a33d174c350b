"""What a person sees of a run: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

from torchtune.distributed.process_group import is_main

SECONDS_BETWEEN_LINES = 5.0


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a message once for all ranks, on standard error; what its encoding lacks is escaped, never an error."""
    if not is_main():
        return
    stream = stream or sys.stderr
    encoding = stream.encoding or "ascii"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()


class Progress:
    """A bar with loss, tokens per second and time left; where there is no terminal, a line now and then.

    Lines come for the first and the last step, and in between at most one in five seconds.

    Args:
        total_steps: steps of the whole run; None where that is not known.
        start_step: steps already made.
    """

    def __init__(self, total_steps: int | None, *, start_step: int = 0, description: str = "training") -> None:
        self.total_steps = total_steps
        self.step = start_step
        self._start_step = start_step
        self._start = time.monotonic()
        self._last_line = -SECONDS_BETWEEN_LINES
        self._bar: Any = None
        if is_main() and sys.stderr.isatty():
            self._open_bar(description)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def update(self, step: int, metrics: dict[str, Any]) -> None:
        """Show that `step` is done; `metrics` are plain numbers."""
        self.step = step
        shown = "  ".join(
            [f"loss {metrics['loss']:.4f}", f"{metrics['tokens_per_second']:.0f} tokens/s"]
            + ([f"held-out loss {metrics['eval_loss']:.4f}"] if "eval_loss" in metrics else [])
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, shown=shown)
        elif self._line_is_due(step) or "eval_loss" in metrics:
            self._last_line = time.monotonic()
            of = f"/{self.total_steps}" if self.total_steps else ""
            say(f"step {step}{of}  {shown}{self._time_left()}")

    def close(self) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _line_is_due(self, step: int) -> bool:
        first_or_last = step == self._start_step + 1 or step == self.total_steps
        return first_or_last or time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES

    def _time_left(self) -> str:
        done = self.step - self._start_step
        if not self.total_steps or not done:
            return ""
        left = (time.monotonic() - self._start) / done * (self.total_steps - self.step)
        return f"  {left / 60:.1f} min left" if left >= 60 else f"  {left:.0f} s left"

    def _open_bar(self, description: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(description, total=self.total_steps, completed=self.step, shown="")
        self._bar.start()
