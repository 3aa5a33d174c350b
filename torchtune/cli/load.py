"""Loading a recipe's module, and running its `main` as if it were the program."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

from torchtune.errors import ConfigError
from torchtune.recipes.registry import FOLDER, Entry


def load_module(recipe: Entry) -> ModuleType:
    """The recipe's module: by its dotted name in the package, by its path elsewhere."""
    if recipe.path.parent == FOLDER:
        return importlib.import_module(f"torchtune.recipes.{recipe.name}")
    folder = str(recipe.path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # never first: a file of the user's must not replace a library
    spec = importlib.util.spec_from_file_location(recipe.name, recipe.path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[recipe.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_main(recipe: Entry, arguments: Sequence[str]) -> int:
    """Call the recipe's `main` with these arguments; a number that it returns is the exit code.

    Raises:
        ConfigError: the file has no `main`.
    """
    module = load_module(recipe)
    if not callable(getattr(module, "main", None)):
        raise ConfigError(f"{recipe.path} has no function main()", where="command line", key="recipe")
    before = sys.argv
    sys.argv = [str(recipe.path), *arguments]
    try:
        result = module.main()
    finally:
        sys.argv = before
    return result if isinstance(result, int) else 0
