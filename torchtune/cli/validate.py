"""`tune validate [torchrun flags] RECIPE [--config X] [key=value ...]`: check a run's options, reading no weight."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

from torchtune.cli.find import find_recipe
from torchtune.errors import ConfigError, did_you_mean
from torchtune.recipes.registry import Entry, configs, recipe_of_config, recipes

USAGE = """\
usage: tune validate [torchrun flags] RECIPE [--config NAME_OR_PATH] [key=value ...]
       tune validate [torchrun flags] CONFIG [key=value ...]

  Checks a run's options without reading a weight.
  --nproc_per_node N       before the recipe: for N processes; other torchrun flags likewise
"""


def run(argv: list[str]) -> int:
    """Check and print that all is well, or raise everything that is wrong."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    num_ranks, argv = _without_flags(argv)
    recipe, arguments = _recipe_and_arguments(argv)
    with num_ranks:
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


def _without_flags(argv: list[str]) -> tuple[AbstractContextManager[None], list[str]]:
    """A context in which as many ranks are planned for as the flags say, and what stands behind these."""
    if not argv[0].startswith("-"):
        return nullcontext(), argv
    from torchtune.cli.run import parse_flags
    from torchtune.distributed.process_group import planned_world_size

    options, fewest_ranks, _ = parse_flags(argv)
    return planned_world_size(fewest_ranks), [options.training_script, *options.training_script_args]


def _recipe_and_arguments(argv: list[str]) -> tuple[Entry, list[str]]:
    first, rest = argv[0], argv[1:]
    path = Path(first)
    if path.suffix in (".yaml", ".yml") or (first in configs() and first not in recipes()):
        file = path if path.is_file() else configs().get(first.removesuffix(".yaml"), Entry("", path, "")).path
        if not file.is_file():
            raise ConfigError(f"there is no config '{first}'{did_you_mean(first, configs())}", where="command line")
        named = recipe_of_config(file)
        if named is None:
            raise ConfigError(
                f"{file} does not say which recipe it is for; name it: tune validate RECIPE --config {file}",
                where="command line",
            )
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
