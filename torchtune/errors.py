"""Every exception that the package raises on purpose. Anything may raise them.

    TuneError
    ├── ConfigError (ValueError)             keys, values or paths of a run that can't be right; all of them at once
    ├── DataError (ValueError)               a file, row or template that can't be trained on
    ├── CheckpointError (ValueError)         a checkpoint that is incomplete, damaged or of another shape
    ├── UnsupportedError (NotImplementedError)  something known that is not supported here
    ├── MissingDependencyError (ImportError) an optional library that has to be installed
    ├── RankError (RuntimeError)             another rank failed in what all do together
    └── TrainingError (RuntimeError)         the run itself went wrong: a loss that is not finite
        └── StoppedBySignal                  asked to stop: saved, and left on purpose

The parts stay on the exception and the text is made from them, so tests and tools read the parts.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` most likely meant, or None if none is near; `learning_rate` is near `lr`."""
    names = list(known)
    if same := [other for other in names if other.lower() == name.lower()]:
        return same[0]
    if matches := difflib.get_close_matches(name, names, n=1, cutoff=0.6):
        return matches[0]
    return next((other for other in names if other == _initials(name) or name == _initials(other)), None)


def _initials(name: str) -> str:
    parts = name.split("_")
    return "".join(part[:1] for part in parts) if len(parts) > 1 else ""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the known names when there are few and none is near, or nothing."""
    names = sorted(known)
    if match := nearest(name, names):
        return f"; did you mean '{match}'?"
    return f"; known: {', '.join(names)}" if 0 < len(names) <= 12 else ""


class TuneError(Exception):
    """The root: catch this to catch all of ours."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a run's options.

    Attributes:
        where: `lora.yaml:14`, `command line` or the name of the argument's source.
        key: the dotted key concerned, or "" when there is none.
        message: what was seen, what it should be, what to do.
    """

    where: str
    key: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.message) if part)


class ConfigError(TuneError, ValueError):
    """All that is wrong with a run's options."""

    def __init__(self, problems: Sequence[Problem] | str, *, key: str = "", where: str = "") -> None:
        if isinstance(problems, str):
            problems = [Problem(where, key, problems)]
        self.problems = tuple(problems)
        lines = [str(problem) for problem in self.problems]
        if len(lines) > 1:
            lines.append(f"{len(lines)} problems, nothing was loaded.")
        super().__init__("\n".join(lines))


class Problems(list[Problem]):
    """What was found wrong so far, to be told at once."""

    def add(self, key: str, message: str) -> None:
        """One more."""
        self.append(Problem("", key, message))

    @contextmanager
    def caught(self, key: str = "") -> Iterator[None]:
        """Take in what is raised within, and go on: a ConfigError's problems, and under `key`, if given, other errors."""
        try:
            yield
        except ConfigError as error:
            self.extend(error.problems)
        except (TuneError, OSError) as error:
            if not key:
                raise
            self.add(key, str(error))

    def raise_all(self) -> None:
        """Raise everything, if there is anything.

        Raises:
            ConfigError: all problems at once.
        """
        if self:
            raise ConfigError(self)


class DataError(TuneError, ValueError):
    """A file, row or template that can't be trained on.

    Attributes:
        source: `chats.jsonl:12` or the file, or None if the message is about the data as a whole.
        problem: what was seen there and what was expected.
    """

    def __init__(self, problem: str, *, source: str | None = None) -> None:
        self.source = source
        self.problem = problem
        super().__init__(f"{source}: {problem}" if source else problem)


class CheckpointError(TuneError, ValueError):
    """A checkpoint that is incomplete, damaged or does not fit; names the file and tensors."""

    def __init__(self, problem: str, *, path: object = None) -> None:
        self.path = path
        self.problem = problem
        super().__init__(f"{path}: {problem}" if path is not None else problem)


class UnsupportedError(TuneError, NotImplementedError):
    """Something known to the field that is not supported here; says what is."""


class MissingDependencyError(TuneError, ImportError):
    """An optional library is absent.

    Attributes:
        package: what has to be installed.
        extra: the extra of this project that holds it.
    """

    def __init__(self, package: str, *, extra: str, needed_for: str) -> None:
        self.package = package
        self.extra = extra
        super().__init__(
            f"{needed_for} needs the package '{package}', which is not installed: "
            f"pip install {package}, or install torchtune with the extra [{extra}]"
        )


class RankError(TuneError, RuntimeError):
    """Another rank failed in what all do together.

    Attributes:
        failures: the ranks that did, each with its reason.
    """

    def __init__(self, failures: Sequence[tuple[int, str]]) -> None:
        self.failures = tuple(failures)
        super().__init__("; ".join(f"rank {rank}: {reason}" for rank, reason in failures))


class TrainingError(TuneError, RuntimeError):
    """The run itself went wrong; the last good checkpoint is kept."""


class StoppedBySignal(TrainingError):
    """The run was asked to stop, saved and left.

    Attributes:
        signal_number: the signal; the process exits with 128 plus this.
    """

    def __init__(self, signal_number: int, message: str) -> None:
        self.signal_number = signal_number
        super().__init__(message)
