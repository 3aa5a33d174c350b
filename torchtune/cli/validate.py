"""`tune validate RECIPE [--config X] [key=value ...]`: check a run's options without reading a weight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torchtune.cli.find import find_recipe
from torchtune.cli.tune import parser
from torchtune.errors import ConfigError, did_you_mean
from torchtune.recipes.registry import Entry, configs, recipe_of_config, recipes

USAGE = "tune validate RECIPE [--config NAME_OR_PATH] [key=value ...], or tune validate CONFIG [key=value ...]"


def run(argv: list[str]) -> int:
    """Check and print that all is well, or raise everything that is wrong."""
    if not argv or argv[0] in ("-h", "--help"):
        parser("validate", "Check a run's options without reading a weight.").print_usage()
        print(USAGE)
        return 0 if argv else 2
    recipe, arguments = _recipe_and_arguments(argv)
    validate(recipe, arguments)
    print(f"{recipe.name}: the options are right")
    return 0


def validate(recipe: Entry, arguments: Sequence[str]) -> None:
    """Parse a recipe's arguments into its params, and compare these with what lies on disk.

    Raises:
        ConfigError: everything that is wrong.
    """
    from torchtune.cli.load import load_module
    from torchtune.config.parse import parse_params

    module = load_module(recipe)
    params: Any = parse_params(_params_class(module, recipe), list(arguments))
    if hasattr(module, "check"):
        module.check(params)


def _recipe_and_arguments(argv: list[str]) -> tuple[Entry, list[str]]:
    first, rest = argv[0], argv[1:]
    path = Path(first)
    if path.suffix in (".yaml", ".yml") or (first in configs() and first not in recipes()):
        file = path if path.is_file() else configs().get(first.removesuffix(".yaml"), Entry("", path, "")).path
        if not file.is_file():
            raise ConfigError(f"there is no config '{first}'{did_you_mean(first, configs())}", where="command line")
        named = recipe_of_config(file)
        if named is None:
            raise ConfigError(f"{file} does not say which recipe it is for: {USAGE}", where="command line")
        return find_recipe(named), ["--config", str(file), *rest]
    return find_recipe(first), rest


def _params_class(module: ModuleType, recipe: Entry) -> type:
    """The class of params that the module defines, or, where it defines none, the one that it imports."""
    classes = {v for name, v in vars(module).items() if isinstance(v, type) and name.endswith("Params")}
    found = [cls for cls in classes if cls.__module__ == module.__name__] or list(classes)
    if len(found) != 1:
        names = ", ".join(sorted(cls.__name__ for cls in found)) or "none"
        raise ConfigError(f"{recipe.path} has no single class called ...Params (it has {names})", key="recipe")
    return found[0]
