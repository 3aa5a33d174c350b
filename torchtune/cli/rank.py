"""The end of one process of several: the first to fail tells why, and its agent learns whether to try again."""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from torchtune.cli.tune import call, exit_code, tell
from torchtune.errors import StoppedBySignal, TuneError

# An elastic agent names this file for each of its processes, and reads it when the process has failed.
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


def run_rank(arguments: Sequence[str]) -> NoReturn:
    """Run a command line as one of several processes, and end the process."""
    if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a wish to save that comes before there is anything to save
    try:
        code = _called(arguments)
        _do_what_is_left()
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Exception as error:
        code = exit_code(error)
        _tell_if_first(error)
    # An orderly end now and then aborts in a thread of the process group's, whose peers are ending too; the status
    # would then be that signal's, and a run that is done would count as one that was lost.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _called(arguments: Sequence[str]) -> int:
    try:
        return call(list(arguments))
    except SystemExit as end:  # a script's own way to say it
        if isinstance(end.code, str):
            tell(end.code)
        return end.code if isinstance(end.code, int) else int(end.code is not None)


def _do_what_is_left() -> None:
    """What Python does at the end of a program: wait for its threads, call what was registered for the end."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()


def is_final(error_data: Mapping[str, Any]) -> bool:
    """Whether the error in this file would only come again: a person's mistake, bad data, a loss that is not finite."""
    return error_data.get("final") is True


def _tell_if_first(error: Exception) -> None:
    from torchtune.distributed import failures
    from torchtune.distributed.process_group import rank

    _tell_agent(error, is_told=False)  # at once: the agent may end this process while it waits for the first one
    # All ranks have agreed to stop; what else there is, the first one tells.
    if not (rank() == 0 if isinstance(error, StoppedBySignal) else failures.is_to_tell(rank())):
        return
    _tell_agent(error, is_told=True)
    if isinstance(error, TuneError):
        tell(str(error))
    else:
        traceback.print_exception(error)
    failures.linger()


def _tell_agent(error: Exception, *, is_told: bool) -> None:
    from torchtune.distributed.failures import follows_from_another

    if not (file := os.environ.get(ERROR_FILE)):
        return
    # The agent's own form, and two words for ours.
    extra = {"py_callstack": "".join(traceback.format_exception(error)), "timestamp": str(int(time.time()))}
    message = {"message": f"{type(error).__name__}: {error}", "extraInfo": extra}
    final = isinstance(error, TuneError) and not follows_from_another(error)
    with open(file, "w", encoding="utf-8") as stream:
        json.dump({"message": message, "told": is_told, "final": final}, stream)
