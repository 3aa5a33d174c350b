"""Finding what a command line names: a recipe or config of the package, or a file of the user's."""

from __future__ import annotations

from pathlib import Path

from torchtune.errors import ConfigError, did_you_mean
from torchtune.recipes.registry import FORMER_NAMES, Entry, configs, recipes

SUFFIXES = (".py", ".yaml", ".yml")


def find_recipe(name: str) -> Entry:
    """A recipe by name, or a Python file by path.

    Raises:
        ConfigError: it is neither; gives the nearest name.
    """
    known = recipes()
    if name in known:
        return known[name]
    path = Path(name)
    if path.suffix == ".py":
        if path.is_file():
            return Entry(path.stem, path, "")
        near = did_you_mean(name, [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else [])
        raise ConfigError(f"there is no file '{name}'{near}", where="command line", key="recipe")
    if name in FORMER_NAMES:
        raise ConfigError(
            f"'{name}' is called '{FORMER_NAMES[name]}' here, on any number of devices",
            where="command line",
            key="recipe",
        )
    raise ConfigError(f"there is no recipe '{name}'{did_you_mean(name, known)}", where="command line", key="recipe")


def find_shipped(name: str) -> Entry:
    """A recipe or config of the package by name.

    Raises:
        ConfigError: there is none; gives the nearest name.
    """
    known = {**configs(), **recipes()}
    plain = name.removesuffix(".yaml").removesuffix(".py")
    if name.endswith(".yaml") and plain in configs():
        return configs()[plain]
    if plain in known:
        return known[plain]
    raise ConfigError(
        f"there is no recipe and no config '{name}'{did_you_mean(name, known)}", where="command line", key="name"
    )
