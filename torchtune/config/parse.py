"""`parse_params`: from the command line to validated params.

Defaults of the dataclass, then the YAML file, then the command line; interpolations last. Every problem
that can be told from the options alone is reported at once, with the line or `command line`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from torchtune.config.component import component_problems
from torchtune.config.find import find_config
from torchtune.config.fit import fit
from torchtune.config.help import help_text
from torchtune.config.interpolation import resolve
from torchtune.config.keys import all_keys, as_plain, keys_of, shorthand
from torchtune.config.problems import problems_of
from torchtune.config.source import (
    COMMAND_LINE,
    Override,
    Settings,
    apply_overrides,
    dotted,
    parse_override,
    read_yaml,
)
from torchtune.errors import ConfigError, Problem

Params = TypeVar("Params")


@dataclass
class Arguments:
    """A recipe's command line, sorted.

    Attributes:
        config: name or path of the YAML file, if any.
        overrides: `key=value` and `~key`, in order.
        wants_help: `--help` is among them.
        problems: arguments that can't be read.
    """

    config: str | None
    overrides: list[Override]
    wants_help: bool
    problems: list[Problem]


def parse_params(cls: type[Params], argv: Sequence[str] | None = None) -> Params:
    """The params that a command line asks for.

    Takes `--config NAME_OR_PATH`, `key=value` (also after `--override`), `~key`, and `--help`, which
    prints every key and exits.

    Args:
        cls: a pydantic dataclass with `STRICT`; torchtune/config/strict.py says how to write one.
        argv: the arguments; by default the program's own.
    Raises:
        ConfigError: everything that is wrong, at once.
    """
    arguments = read_arguments(sys.argv[1:] if argv is None else argv)
    if arguments.wants_help:
        print(help_text(cls))
        raise SystemExit(0)
    problems = list(arguments.problems)
    settings = Settings()
    if arguments.config is not None:
        try:
            settings = read_yaml(find_config(arguments.config))
        except ConfigError as error:
            # Without the file, keys would seem to be missing that are in it.
            raise ConfigError([*problems, *error.problems]) from error
    problems += apply_overrides(settings, arguments.overrides, shorthands=_shorthands(cls))
    return build_params(cls, settings, problems)


def build_params(cls: type[Params], settings: Settings, problems: Sequence[Problem] = ()) -> Params:
    """Validated params from settings.

    Args:
        problems: what is wrong already; raised together with what is found here.
    Raises:
        ConfigError: everything that is wrong. What several keys must have in common is looked at once each
            of them is right.
    """
    found = list(problems)
    found += resolve(settings, _defaults(cls))
    found += fit(cls, settings)
    found += component_problems(settings)
    try:
        params = cls(**settings.values)
    except ValidationError as error:
        known = {problem.key for problem in found}
        found += [problem for problem in problems_of(error, cls, settings) if problem.key not in known]
    if found:
        raise ConfigError(found)
    return params


def read_arguments(argv: Sequence[str]) -> Arguments:
    """Sort a recipe's arguments; what can't be read becomes a problem."""
    arguments = Arguments(None, [], False, [])
    waiting = list(argv)
    while waiting:
        argument = waiting.pop(0)
        name, equals, value = argument.partition("=")
        if argument in ("-h", "--help"):
            arguments.wants_help = True
        elif name == "--config":
            if not equals and (not waiting or waiting[0].startswith("-")):
                arguments.problems.append(Problem(COMMAND_LINE, "--config", "needs the name or path of a YAML file"))
                continue
            _take_config(arguments, value if equals else waiting.pop(0))
        elif argument != "--override":
            _take_override(arguments, argument.removeprefix("--override="), waiting)
    return arguments


def _take_config(arguments: Arguments, name: str) -> None:
    if arguments.config is not None:
        arguments.problems.append(Problem(COMMAND_LINE, "--config", "is given twice; give one"))
    arguments.config = name


# torchrun's, that people write behind the recipe.
LAUNCH_FLAGS = frozenset(
    [
        "nproc_per_node",
        "nnodes",
        "node_rank",
        "max_restarts",
        "standalone",
        "master_addr",
        "master_port",
        "log_dir",
        "tee",
        "redirects",
        "rdzv_backend",
        "rdzv_endpoint",
        "rdzv_id",
        "rdzv_conf",
    ]
)


def _take_override(arguments: Arguments, argument: str, waiting: list[str]) -> None:
    if argument.startswith("-"):
        name, equals, value = argument.lstrip("-").partition("=")
        if not equals and waiting and "=" not in waiting[0] and not waiting[0].startswith(("-", "~")):
            value = waiting.pop(0)
        flag = name.replace("-", "_")
        message = f"options are written key=value: {flag}={value or '...'}"
        if flag in LAUNCH_FLAGS:
            message = (
                f"is a flag of the launch, and goes before the recipe: tune run --{flag} {value or '...'} RECIPE ..."
            )
        arguments.problems.append(Problem(COMMAND_LINE, argument, message))
        return
    try:
        arguments.overrides.append(parse_override(argument))
    except ConfigError as error:
        arguments.problems += error.problems


def _shorthands(cls: type) -> dict[str, str]:
    found = {}
    for path, key in all_keys(cls):
        if key.type.is_component:
            found[dotted(path)] = "_component_"
        elif key.type.nested is not None and (short := shorthand(key.type.nested)):
            found[dotted(path)] = short
    return found


def _defaults(cls: type) -> dict[str, Any]:
    return {name: as_plain(key.default) for name, key in keys_of(cls).items() if key.default is not None}
