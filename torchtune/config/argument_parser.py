"""The founding text's argument parser: `--config` and `--override`, into a plain namespace."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from torchtune.config.find import find_config
from torchtune.config.parse import read_arguments
from torchtune.config.source import Settings, apply_overrides, read_yaml
from torchtune.errors import ConfigError


class TuneArgumentParser(argparse.ArgumentParser):
    """An ArgumentParser whose `--config` YAML gives defaults and whose `--override key=value` wins over them.

    Bare `key=value` is an override too. `parse_known_args` leaves `config` and `override` out of the
    namespace, so that `Params(**vars(args))` takes it as it is; keys may be nested.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_argument("--config", help="a YAML file, or the name of a config of the package")
        self.add_argument("--override", nargs="+", action="extend", default=[], help="key=value, wins over the config")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Declared arguments, then the YAML's keys, then overrides, each winning over the one before.

        Raises:
            ConfigError: an override or the YAML can't be read.
        """
        found, rest = super().parse_known_args(args, namespace)
        bare = [argument for argument in rest if "=" in argument and not argument.startswith("-")]
        others = [argument for argument in rest if argument not in bare]
        settings = read_yaml(find_config(found.config)) if found.config else Settings()
        arguments = read_arguments([*found.override, *bare])
        problems = [*arguments.problems, *apply_overrides(settings, arguments.overrides, shorthands={})]
        if problems:
            raise ConfigError(problems)
        del found.config, found.override
        for key, value in settings.values.items():
            setattr(found, key, value)
        return found, others
