"""Find a config by the name that `--config` was given. Imports nothing heavy: `tune ls` uses it."""

from __future__ import annotations

from pathlib import Path

from torchtune.errors import ConfigError, did_you_mean

SHIPPED = Path(__file__).parent.parent / "recipes" / "configs"
SUFFIXES = (".yaml", ".yml")


def shipped_configs() -> dict[str, Path]:
    """The configs that come with the package, by name: the path below `recipes/configs` without `.yaml`."""
    files = sorted(path for path in SHIPPED.rglob("*") if path.suffix in SUFFIXES)
    return {path.relative_to(SHIPPED).with_suffix("").as_posix(): path for path in files}


def find_config(name: str) -> Path:
    """The file that `name` means: a path that exists, else a shipped config.

    Raises:
        ConfigError: it is neither; with the nearest name.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_configs()
    if name.removesuffix(".yaml") in shipped:
        return shipped[name.removesuffix(".yaml")]
    if path.is_dir():
        raise ConfigError(f"'{name}' is a folder; name a YAML file in it", key="--config", where="command line")
    beside = [str(near) for near in path.parent.glob("*") if near.suffix in SUFFIXES] if path.parent.is_dir() else []
    hint = did_you_mean(name, [*shipped, *beside]) or "; tune ls lists the configs"
    raise ConfigError(f"there is no file and no config '{name}'{hint}", key="--config", where="command line")
