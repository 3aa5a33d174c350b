"""Where options come from: a YAML file and the command line, as plain values that remember their origin.

YAML is read by OmegaConf, so `2e-5` is a number. What a key means is decided later, by its type; so each
plain scalar also keeps its text, from which a text key gets `007` or `1.10` as they were typed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from torchtune.errors import ConfigError, Problem, did_you_mean

KeyPath = tuple[str | int, ...]

COMMAND_LINE = "command line"

# YAML 1.1 reads 010 as eight and 1:30 as ninety; nobody who writes a config means that.
_SURPRISING_NUMBER = re.compile(r"[-+]?0[0-9_]+$|[-+]?[0-9_]+(:[0-9_.]+)+$")


@dataclass(frozen=True)
class Origin:
    """Where a value was written.

    Attributes:
        where: `lora.yaml:14` or `command line`.
        text: an unquoted scalar as it was typed; on the command line anything unquoted; else None.
    """

    where: str
    text: str | None = None


@dataclass
class Settings:
    """Values as written, and where each of them was.

    Attributes:
        values: nested plain mappings, lists and scalars; interpolations are still text.
        origins: by path; a path without one of its own has its parent's.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, Origin] = field(default_factory=dict)

    def origin(self, path: KeyPath) -> Origin:
        """Where `path`, or the nearest thing around it, was written."""
        if path in self.origins:
            return self.origins[path]
        around = next(
            (self.origins[path[:end]] for end in range(len(path), -1, -1) if path[:end] in self.origins), None
        )
        return Origin(around.where if around else COMMAND_LINE)

    def set(self, path: KeyPath, value: Any, origins: Mapping[KeyPath, Origin]) -> None:
        """Put `value` at `path`, replacing what is there, with its origins relative to it."""
        parent: Any = self.values
        for part in path[:-1]:
            parent = parent.setdefault(part, {})
        parent[path[-1]] = value
        self._forget(path)
        self.origins.update({path + below: origin for below, origin in origins.items()})

    def delete(self, path: KeyPath) -> None:
        """Take `path` out, and mappings that are empty without it."""
        parent = self.get(path[:-1])
        del parent[path[-1]]
        self._forget(path)
        if not parent and len(path) > 1:
            self.delete(path[:-1])

    def get(self, path: KeyPath) -> Any:
        """The value at `path`; KeyError when there is none."""
        value: Any = self.values
        for part in path:
            if isinstance(part, str) and not isinstance(value, dict):
                raise KeyError(path)
            value = value[part]
        return value

    def _forget(self, path: KeyPath) -> None:
        for known in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[known]


def dotted(path: KeyPath) -> str:
    """`("datasets", 0, "path")` as `datasets[0].path`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def read_yaml(path: Path) -> Settings:
    """The settings of a YAML file.

    Raises:
        ConfigError: no such file, not UTF-8, not YAML, a key given twice, or not a mapping; with the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"can't be read: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 (byte {error.start}); save it as UTF-8", where=str(path)) from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return Settings(origins={(): Origin(str(path))})
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError("should be a mapping of keys to values", where=str(path))
        values = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_message(error), where=_yaml_where(error, str(path))) from error
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error), key=error.full_key or "", where=str(path)) from error
    assert isinstance(values, dict)
    settings = Settings()
    settings.values = _with_origins(node, values, str(path), settings.origins)
    settings.origins[()] = Origin(str(path))
    return settings


def _with_origins(node: yaml.Node, value: Any, name: str, origins: dict[KeyPath, Origin], path: KeyPath = ()) -> Any:
    """`value` as it is meant; notes the line and text of it and of all below it."""
    where = f"{name}:{node.start_mark.line + 1}" if name != COMMAND_LINE else name
    if isinstance(node, yaml.ScalarNode):
        plain = node.style is None
        origins[path] = Origin(where, node.value if plain else None)
        return _as_meant(node.value, value) if plain else value
    origins[path] = Origin(where)
    if isinstance(node, yaml.MappingNode) and isinstance(value, dict):
        children = {key.value: (key, child) for key, child in node.value if isinstance(key, yaml.ScalarNode)}
        found = {}
        for key, below in value.items():
            key_node, child = children.get(str(key), (None, None))
            # Keys that a YAML merge (<<) brought in have no node here; their parent's line stands for them.
            found[str(key)] = _with_origins(child, below, name, origins, (*path, str(key))) if child else below
            place = (*path, str(key))
            if key_node is not None and name != COMMAND_LINE:
                text = origins[place].text
                origins[place] = Origin(f"{name}:{key_node.start_mark.line + 1}", text)
        return found
    if isinstance(node, yaml.SequenceNode) and isinstance(value, list):
        pairs = enumerate(zip(node.value, value, strict=True))
        return [_with_origins(child, below, name, origins, (*path, i)) for i, (child, below) in pairs]
    return value


def _as_meant(text: str, value: Any) -> Any:
    if text == "None":
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and _SURPRISING_NUMBER.match(text):
        return text
    return value


def _yaml_message(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or str(error)
    if problem.startswith("found duplicate key"):
        return problem.replace("found duplicate key", "this key stands here a second time:")
    return f"is not YAML: {problem}"


def _yaml_where(error: yaml.YAMLError, name: str) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return f"{name}:{mark.line + 1}" if mark else name


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


@dataclass(frozen=True)
class Override:
    """One `key=value` or `~key` of the command line.

    Attributes:
        argument: as typed.
        path: the key.
        deletes: it is a `~key`.
        value: what `key` is set to.
        origins: of `value` and what is below it, by path relative to it.
    """

    argument: str
    path: KeyPath
    deletes: bool = False
    value: Any = None
    origins: dict[KeyPath, Origin] = field(default_factory=dict)


def parse_override(argument: str) -> Override:
    """Read `key=value` or `~key`; the value is YAML and may contain `=`.

    Raises:
        ConfigError: it is neither, has no key or no value, or the value is not YAML.
    """
    if argument.startswith("~"):
        return Override(argument, _key_path(argument[1:], argument), deletes=True)
    key, equals, text = argument.partition("=")
    if not equals:
        raise ConfigError(f"'{argument}' is no option; write key=value, or ~key to drop a key", where=COMMAND_LINE)
    path = _key_path(key, argument)
    if not text:
        raise ConfigError(
            "has no value after '='; write null for none, or '\"\"' for empty text", key=key, where=COMMAND_LINE
        )
    origins: dict[KeyPath, Origin] = {}
    # YAML takes a dash for a list of nothing; people mean standard input.
    value = text if text == "-" else _parse_value(text, origins)
    quoted = value != text and text[0] in "\"'"
    # Whatever was read from it, a key that takes text gets what was typed.
    origins[()] = Origin(COMMAND_LINE, None if quoted else text)
    return Override(argument, path, value=value, origins=origins)


def _parse_value(text: str, origins: dict[KeyPath, Origin]) -> Any:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        read = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException):
        # Not YAML, such as `@file` or `100%: [`: it is text, and refused later where text won't do.
        return text
    assert isinstance(read, dict)
    return _with_origins(node, read["value"], COMMAND_LINE, origins) if node is not None else text


def _key_path(key: str, argument: str) -> KeyPath:
    parts = key.split(".")
    if not all(re.fullmatch(r"[^\s=\[\]{}]+", part) for part in parts):
        raise ConfigError(f"'{argument}' has no readable key; write key=value or nested.key=value", where=COMMAND_LINE)
    return tuple(parts)


def apply_overrides(settings: Settings, overrides: list[Override], *, shorthands: Mapping[str, str]) -> list[Problem]:
    """Write the command line over the settings of a YAML file: what is assigned is replaced, lists and mappings too.

    One exception, as users know it: `optimizer=dotted.path` over a component's mapping names another
    callable and keeps the other arguments.

    Args:
        shorthands: for a dotted key whose mapping may be written as one of its values, the name of that one.
    Returns:
        Problems: a `~key` that is not there, a nested key below a value that is no mapping.
    """
    problems = [problem for override in overrides if override.deletes for problem in _delete(settings, override)]
    for override in overrides:
        if not override.deletes:
            problems += _assign(settings, override, shorthands)
    return problems


def _delete(settings: Settings, override: Override) -> Iterator[Problem]:
    try:
        settings.get(override.path)
    except (KeyError, IndexError, TypeError):
        known = [dotted(path) for path in settings.origins if path]
        hint = did_you_mean(dotted(override.path), known) if known else "; there is no config file"
        yield Problem(COMMAND_LINE, override.argument, f"the config has no such key to drop{hint}")
        return
    settings.delete(override.path)


def _assign(settings: Settings, override: Override, shorthands: Mapping[str, str]) -> Iterator[Problem]:
    path, value = override.path, override.value
    for end in range(1, len(path)):
        try:
            around = settings.get(path[:end])
        except KeyError:
            break
        if around is None:
            settings.set(path[:end], {}, {(): Origin(COMMAND_LINE)})
        elif not isinstance(around, dict):
            short = shorthands.get(dotted(path[:end]))
            if short is None or isinstance(around, list):
                message = f"'{dotted(path[:end])}' is {around!r} and has no keys below it"
                yield Problem(COMMAND_LINE, dotted(path), message)
                return
            origin = settings.origin(path[:end])
            settings.set(path[:end], {short: around}, {(): Origin(origin.where), (short,): origin})
    try:
        before = settings.get(path)
    except KeyError:
        before = None
    if isinstance(before, dict) and "_component_" in before and isinstance(value, str) and "." in value:
        settings.set((*path, "_component_"), value, {(): Origin(COMMAND_LINE)})
    else:
        settings.set(path, value, override.origins)
