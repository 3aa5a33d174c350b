"""Loading a recipe's module, and running it as the program."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import runpy
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
    """Call the recipe's `main` with these arguments; a file without one is run as a script.

    Returns:
        The exit code: a number that `main` returns, else 0.
    """
    before = sys.argv
    sys.argv = [str(recipe.path), *arguments]
    try:
        if not defines_main(recipe):
            runpy.run_path(str(recipe.path), run_name="__main__")
            return 0
        result = load_module(recipe).main()
    finally:
        sys.argv = before
    return result if isinstance(result, int) else 0


def defines_main(recipe: Entry) -> bool:
    """Whether the file has a `main`; it is read and not run, since a script does its work when it is loaded."""
    try:
        tree = ast.parse(recipe.path.read_bytes(), filename=str(recipe.path))
    except SyntaxError as error:
        raise ConfigError(f"{recipe.path}:{error.lineno}: {error.msg}", where="command line", key="recipe") from error
    bound: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            bound.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            bound.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            bound.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return "main" in bound
