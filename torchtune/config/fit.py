"""Bring settings into the form that a params class means, before it validates them.

Typed text for text keys, shorthands spelt out, defaults below a component's own arguments; and what
pydantic would let pass: unknown keys get their nearest right name, `true` is no number.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchtune.config.component import COMPONENT, keyword_names
from torchtune.config.keys import Key, Type, all_keys, keys_of, shorthand
from torchtune.config.source import KeyPath, Settings, dotted
from torchtune.errors import Problem, did_you_mean, nearest


def fit(cls: type, settings: Settings) -> Iterator[Problem]:
    """Change `settings` in place into what `cls` takes; problems of its keys as they are found."""
    yield from _fit_mapping(cls, settings, (), cls)


def _fit_mapping(cls: type, settings: Settings, path: KeyPath, root: type) -> Iterator[Problem]:
    keys = keys_of(cls)
    mapping = settings.get(path)
    for name in list(mapping):
        below = (*path, name)
        if name in keys:
            yield from _fit_value(keys[name].type, settings, below, root, keys[name])
        else:
            yield Problem(settings.origin(below).where, dotted(below), _unknown(name, cls, path, root))
            del mapping[name]


def _fit_value(kind: Type, settings: Settings, path: KeyPath, root: type, key: Key | None = None) -> Iterator[Problem]:
    value = settings.get(path)
    nested = kind.nested
    if kind.is_component:
        _fit_component(settings, path, key)
    elif nested is not None and (isinstance(value, dict) or _stands_for(kind, value)):
        if not isinstance(value, dict):
            _spell_out(settings, path, shorthand(nested, value) or "")
        yield from _fit_mapping(nested, settings, path, root)
    elif isinstance(value, list) and (item := kind.item((list, tuple, set))):
        for index in range(len(value)):
            yield from _fit_value(item, settings, (*path, index), root)
    elif isinstance(value, dict) and (item := kind.item((dict,))):
        for name in value:
            yield from _fit_value(item, settings, (*path, name), root)
    else:
        yield from _fit_scalar(kind, settings, path)


def _stands_for(kind: Type, value: Any) -> bool:
    """Whether a value that is no mapping is the shorthand of the mapping wanted here."""
    assert kind.nested is not None
    return shorthand(kind.nested, value) is not None and value is not None and not _is_of(kind, value)


def _is_of(kind: Type, value: Any) -> bool:
    """Whether a scalar needs no reading to be of one of the plain types."""
    plain = kind.plain
    if Any in plain or type(value) in plain or value in kind.choices:
        return True
    # A whole float is an integer, every integer a float, and 0 and 1 are booleans where no number is wanted.
    if isinstance(value, int | float) and not isinstance(value, bool):
        return bool(plain & {int, float}) or (bool in plain and value in (0, 1))
    return False


def _spell_out(settings: Settings, path: KeyPath, short: str) -> None:
    value, origin = settings.get(path), settings.origin(path)
    below = {(short, *known[len(path) :]): o for known, o in settings.origins.items() if known[: len(path)] == path}
    _replace(settings, path, {short: value})
    settings.origins.update({path + known: o for known, o in below.items()})
    settings.origins[path] = origin


def _replace(settings: Settings, path: KeyPath, value: Any) -> None:
    settings.get(path[:-1])[path[-1]] = value


def _fit_component(settings: Settings, path: KeyPath, key: Key | None) -> None:
    value = settings.get(path)
    if isinstance(value, str):
        _spell_out(settings, path, COMPONENT)
    elif isinstance(value, dict) and COMPONENT not in value and key is not None and isinstance(key.default, dict):
        _replace(settings, path, {**key.default, **value})


def _fit_scalar(kind: Type, settings: Settings, path: KeyPath) -> Iterator[Problem]:
    value, origin = settings.get(path), settings.origin(path)
    if isinstance(value, bool) and not kind.plain & {bool, str, Any} and kind.plain & {int, float}:
        seen = str(value).lower()
        yield Problem(origin.where, dotted(path), f"should be {kind}, got {seen}")
        _replace(settings, path, None)
    elif str in kind.plain and origin.text is not None and value is not None and not _is_of(kind, value):
        _replace(settings, path, origin.text)


def _unknown(name: str, cls: type, path: KeyPath, root: type) -> str:
    if ":" in name:
        return f"unknown key; write a space after the colon: '{name.replace(':', ': ', 1)}'"
    siblings = keys_of(cls)
    if match := nearest(name, siblings):
        return f"unknown key; did you mean '{dotted((*path, match))}'?"
    elsewhere = dict(_names_everywhere(root))
    if name in elsewhere or (match := nearest(name, elsewhere)):
        return f"unknown key; did you mean '{elsewhere.get(name) or elsewhere[match or '']}'?"
    if path:
        return f"unknown key{did_you_mean(name, siblings)}"
    return "unknown key; --help lists all keys"


def _names_everywhere(root: type) -> Iterator[tuple[str, str]]:
    """Each key's last name with its dotted one, and the arguments of components; the outermost come last and win."""
    found = sorted(all_keys(root), key=lambda entry: -len(entry[0]))
    for path, key in found:
        if key.type.is_component and isinstance(key.default, dict):
            for keyword in keyword_names(key.default.get(COMPONENT)):
                yield keyword, f"{dotted(path)}.{keyword}"
    for path, _ in found:
        yield path[-1], dotted(path)
