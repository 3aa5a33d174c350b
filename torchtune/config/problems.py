"""Pydantic's complaints as ours: where it was written, what was seen, what it should be."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from torchtune.config.keys import Key, Type, all_keys, keys_of
from torchtune.config.source import KeyPath, Settings, dotted
from torchtune.errors import Problem, did_you_mean

_MISSING = "missing"
_OUR_OWN = "value_error"
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}


def problems_of(error: ValidationError, cls: type, settings: Settings) -> list[Problem]:
    """One problem per key that is wrong, in the order of the keys."""
    by_key: dict[KeyPath, list[Any]] = {}
    for detail in error.errors(include_url=False):
        by_key.setdefault(_path_of(detail, settings.values), []).append(detail)
    problems: list[Problem] = []
    for path, details in by_key.items():
        problems += _problems_at(path, details, cls, settings)
    return problems


def _path_of(detail: Any, values: Any) -> KeyPath:
    """The key that a complaint is about: its location without the names of a union's members."""
    path: list[str | int] = []
    for part in detail["loc"]:
        if (isinstance(values, dict) and part in values) or (
            isinstance(values, list) and isinstance(part, int) and part < len(values)
        ):
            path.append(part)
            values = values[part]
    if detail["type"] in (_MISSING, "unexpected_keyword_argument"):
        return (*path, detail["loc"][-1]) if not path or path[-1] != detail["loc"][-1] else tuple(path)
    return tuple(path)


def _problems_at(path: KeyPath, details: Sequence[Any], cls: type, settings: Settings) -> Iterator[Problem]:
    where, key = settings.origin(path).where, dotted(path)
    kinds = {detail["type"] for detail in details}
    own = [detail for detail in details if detail["type"] == _OUR_OWN]
    declared = _key_at(cls, path)
    if _MISSING in kinds:
        yield Problem(where if len(path) > 1 else "", key, _missing_message(key, declared))
    elif "unexpected_keyword_argument" in kinds:
        yield Problem(where, key, "unknown key")
    elif own:
        for detail in own:
            yield from _own_problems(str(detail["ctx"]["error"]), path, cls, settings)
    else:
        yield Problem(where, key, _type_message(details, declared.type if declared else None, path))


def _missing_message(key: str, declared: Key | None) -> str:
    line = f": {declared.description}" if declared and declared.description else ""
    return f"is required{line.rstrip('.')}; give {key}=..."


def _own_problems(text: str, path: KeyPath, cls: type, settings: Settings) -> Iterator[Problem]:
    """A validator's `ValueError("key: message\\nkey: message")` or just a message about its own key."""
    known = {dotted(below) for below, _ in all_keys(cls)}
    for line in text.splitlines():
        name, colon, message = line.partition(": ")
        full = dotted((*path, name))
        if colon and full in known:
            yield Problem(settings.origin((*path, *name.split("."))).where, full, message)
        else:
            yield Problem(settings.origin(path).where, dotted(path), line)


def _type_message(details: Sequence[Any], kind: Type | None, path: KeyPath) -> str:
    first = details[0]
    seen = show(first["input"])
    if len(details) == 1 and first["type"] in _BOUNDS:
        name, words = _BOUNDS[first["type"]]
        return f"should be {words} {first['ctx'][name]:g}, got {seen}"
    if len(details) == 1 and first["type"] == "finite_number":
        return f"should be a finite number, got {seen}"
    if kind is None:
        return f"{_lower_first(first['msg'].removeprefix('Input '))}, got {seen}"
    if kind.choices and isinstance(first["input"], str):
        return f"'{first['input']}' is none of {kind}{_only_meant(first['input'], kind.choices)}"
    return f"should be {kind}, got {seen}"


def _only_meant(value: str, choices: Sequence[Any]) -> str:
    hint = did_you_mean(value, [str(choice) for choice in choices])
    return hint if hint.startswith("; did you mean") else ""


def _key_at(cls: type, path: KeyPath) -> Key | None:
    """The declaration of the key at `path`, looking through mappings and lists of params classes."""
    key = None
    current: Any = cls
    for part in path:
        if isinstance(part, int):
            continue
        key = keys_of(current).get(part) if current is not None else None
        if key is None:
            return None
        item = key.type.item((list, tuple, dict))
        current = key.type.nested or (item.nested if item else None)
    return None if path and isinstance(path[-1], int) else key


def show(value: Any) -> str:
    """A value in a message: as it would be written, with its kind where that is the point."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text '{_short(value)}'"
    if isinstance(value, dict):
        return f"the mapping {_short(re.sub(chr(39), '', str(value)))}"
    if isinstance(value, list | tuple):
        return f"the list {_short(str(list(value)))}"
    return str(value)


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
