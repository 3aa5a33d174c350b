"""The `tune` command: picks the verb. Only what a verb needs is imported, so `tune --help` does not wait for torch."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence

from torchtune import __version__
from torchtune.errors import ConfigError, StoppedBySignal, TuneError, did_you_mean

# Verb, and what it says of itself in `tune --help`. Each is a file of this package.
VERBS = {
    "run": "run a recipe, on one device or many",
    "ls": "list the recipes and configs that come with the package",
    "cp": "copy a recipe or config, to change it",
    "cat": "print a recipe or config",
    "inspect": "look at data as it will be trained on: numbers, rows token by token",
    "validate": "check a run's options without reading a weight",
    "download": "fetch a checkpoint from the hub",
}
SECONDS_FOR_RANK_0 = 3.0
USAGE = """\
usage: tune VERB ...

{verbs}

tune VERB --help says more. To begin: tune run full_finetune model_checkpoint=DIR dataset=FILE.jsonl
"""


def main(argv: Sequence[str] | None = None) -> None:
    """The command's entry point; ends the process with the verb's exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if "RANK" not in os.environ:
        sys.exit(run(arguments))
    try:
        code = run(arguments)
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    if code:
        # One of several failed, and has said so. An orderly end could abort in the process group's threads, whose
        # peers are ending too; the status would then be a signal's and not the failure's.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(argv: list[str]) -> int:
    """Run a command line and return its exit code: 0 done, 1 failed, 2 wrong usage, 128 + n stopped by a signal."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE.format(verbs="\n".join(f"  {verb:10} {line}" for verb, line in VERBS.items())))
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        return _complain(f"tune: there is no verb '{verb}'{did_you_mean(verb, VERBS)}", 2)
    module = importlib.import_module(f"torchtune.cli.{verb}")
    try:
        return int(module.run(rest))
    except StoppedBySignal as error:
        return _complain(str(error), 128 + error.signal_number)
    except ConfigError as error:
        return _complain(str(error), 2)
    except TuneError as error:
        return _complain(str(error), 1)


def parser(verb: str, description: str) -> argparse.ArgumentParser:
    """A verb's argument parser."""
    return argparse.ArgumentParser(prog=f"tune {verb}", description=description)


def _complain(text: str, code: int) -> int:
    if int(os.environ.get("RANK", 0)):
        # What is wrong for all ranks is told once, by rank 0: its end ends this process while it waits here.
        time.sleep(SECONDS_FOR_RANK_0)
    # Whatever the terminal's encoding lacks is escaped: an error about a name must not fail on it.
    encoding = sys.stderr.encoding or "ascii"
    sys.stderr.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    return code


if __name__ == "__main__":
    main()
