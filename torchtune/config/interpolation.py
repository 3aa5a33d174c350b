"""Resolve `${other.key}` and `${oc.env:NAME}`: last, when every value stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationKeyError, OmegaConfBaseException

from torchtune.config.source import KeyPath, Settings, dotted
from torchtune.errors import Problem


def resolve(settings: Settings, defaults: Mapping[str, Any]) -> Iterator[Problem]:
    """Put the value in the place of each interpolation.

    Args:
        defaults: what an interpolation of a key that is not given refers to; a key without a value has none.
    Returns:
        Problems: a key that is not there or a circle, each with the key whose value asks for it.
    """
    places = [path for path, value in _leaves(settings.values) if isinstance(value, str) and "${" in value]
    if not places:
        return
    unread = {}
    for path in places:
        try:
            OmegaConf.create({"value": settings.get(path)})
        except GrammarParseError as error:
            unread[path] = error
            settings.get(path[:-1])[path[-1]] = None
            yield _problem(settings, path, f"can't be read: {_first_line(error)}; write \\${{ for the text itself")
    config = OmegaConf.merge(OmegaConf.create(_without_none(defaults)), OmegaConf.create(settings.values))
    for path in places:
        if path in unread:
            continue
        written = settings.get(path)
        try:
            found = OmegaConf.select(config, dotted(path), throw_on_resolution_failure=True)
        except (OmegaConfBaseException, RecursionError) as error:
            yield _problem(settings, path, _message(written, error))
            found = None
        if OmegaConf.is_config(found):
            found = OmegaConf.to_container(found, resolve=True)
        settings.get(path[:-1])[path[-1]] = found


def _leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, (*path, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))
    else:
        yield path, value


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    return value


def _problem(settings: Settings, path: KeyPath, message: str) -> Problem:
    return Problem(settings.origin(path).where, dotted(path), message)


def _message(written: str, error: Exception) -> str:
    first = _first_line(error)
    if isinstance(error, InterpolationKeyError):
        wanted = first.partition("'")[2].partition("'")[0]
        return f"'{written}' asks for '{wanted}', which is not set"
    if "ecursi" in first:
        return f"'{written}' refers to itself in a circle"
    if "Environment variable" in first:
        return f"'{written}': {first.rpartition(': ')[2].strip(chr(34))}"
    return f"'{written}': {first}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
