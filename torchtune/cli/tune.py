"""The `tune` command: picks the verb. Only what a verb needs is imported, so `tune --help` does not wait for torch."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from torchtune import __version__
from torchtune.errors import ConfigError, StoppedBySignal, TuneError, did_you_mean

# Verb, and what it says of itself in `tune --help`. Each is a file of this package.
VERBS = {
    "run": "run a recipe, on one device or many",
    "ls": "list the recipes and configs that come with the package",
    "cp": "copy a recipe or config, to change it",
    "cat": "print a recipe or config",
    "chat": "talk with a model in the terminal",
    "inspect": "look at data as it will be trained on: numbers, rows token by token",
    "validate": "check a run's options without reading a weight",
    "download": "fetch a checkpoint from the hub",
    "push": "put a model or adapter on the hub",
}
USAGE = """\
usage: tune VERB ...

{verbs}

tune VERB --help says more. To begin: tune run full_finetune model_checkpoint=DIR dataset=FILE.jsonl
"""


def main(argv: Sequence[str] | None = None) -> None:
    """The command's entry point; ends the process with the verb's exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if "RANK" in os.environ:  # a launcher's
        from torchtune.cli.rank import run_rank

        run_rank(arguments)
    try:
        sys.exit(run(arguments))
    except KeyboardInterrupt:
        tell("interrupted")
        sys.exit(128 + signal.SIGINT)


def run(argv: list[str]) -> int:
    """Run a command line and return its exit code: 0 done, 1 failed, 2 wrong usage, 128 + n stopped by a signal."""
    try:
        return call(argv)
    except TuneError as error:
        tell(str(error))
        return exit_code(error)


def call(argv: list[str]) -> int:
    """Run a command line and return its exit code.

    Raises:
        TuneError: what went wrong, to be told.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE.format(verbs="\n".join(f"  {verb:10} {line}" for verb, line in VERBS.items())))
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        raise ConfigError(f"there is no verb '{verb}'{did_you_mean(verb, VERBS)}", where="tune")
    return int(importlib.import_module(f"torchtune.cli.{verb}").run(rest))


def exit_code(error: Exception) -> int:
    """What the process ends with after this error."""
    if isinstance(error, StoppedBySignal):
        return 128 + error.signal_number
    return 2 if isinstance(error, ConfigError) else 1


def tell(text: str) -> None:
    """Print on standard error; what its encoding lacks is escaped: an error about a name must not fail on it."""
    encoding = sys.stderr.encoding or "ascii"
    sys.stderr.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def parser(verb: str, description: str) -> argparse.ArgumentParser:
    """A verb's argument parser."""
    return argparse.ArgumentParser(prog=f"tune {verb}", description=description)


if __name__ == "__main__":
    main()
