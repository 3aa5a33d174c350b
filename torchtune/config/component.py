"""`_component_: dotted.path`: a config names any callable, the library's or the user's.

    optimizer:
      _component_: torch.optim.AdamW
      lr: 2e-5

The other keys are its keyword arguments; values that are components themselves are built first. They are
checked against the callable's signature before anything runs. Configs are trusted like code.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, WithJsonSchema

from torchtune.config.keys import ComponentMark
from torchtune.config.source import KeyPath, Settings, dotted
from torchtune.errors import ConfigError, Problem, did_you_mean

COMPONENT = "_component_"


def _from_path(value: Any) -> Any:
    return {COMPONENT: value} if isinstance(value, str) else value


def _names_a_callable(value: dict[str, Any]) -> dict[str, Any]:
    path = value.get(COMPONENT)
    if not isinstance(path, str) or "." not in path.strip("."):
        raise ValueError(f"needs {COMPONENT}, the dotted path of a callable such as torch.optim.AdamW, got {path!r}")
    return value


# A mapping with `_component_`; a dotted path alone is the mapping without arguments.
Component = Annotated[
    dict[str, Any],
    BeforeValidator(_from_path),
    AfterValidator(_names_a_callable),
    ComponentMark(),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "object", "properties": {COMPONENT: {"type": "string"}}, "additionalProperties": True},
            ]
        }
    ),
]


def is_component(value: Any) -> bool:
    """Whether `value` is a mapping that names a callable."""
    return isinstance(value, Mapping) and COMPONENT in value


def instantiate(component: Any, *args: Any, **kwargs: Any) -> Any:
    """Call what a component names, with its keywords; those given here win.

    Args:
        component: a mapping with `_component_`, or a dotted path. None gives None; any other object is
            taken to be built already and is returned.
    Raises:
        ConfigError: the path leads nowhere, or the arguments don't fit the signature.
    """
    if isinstance(component, str):
        component = {COMPONENT: component}
    if not is_component(component):
        return component
    path = component[COMPONENT]
    target = find_callable(path)
    own = {name: build_nested(value) for name, value in component.items() if name not in (COMPONENT, *kwargs)}
    keywords = {**own, **kwargs}
    if (signature := _signature(target)) is not None:
        try:
            signature.bind(*args, **keywords)
        except TypeError as error:
            raise ConfigError(f"{path}: {error}", key=COMPONENT) from error
    return target(*args, **keywords)


def build_nested(value: Any) -> Any:
    """`value` with every component in it built."""
    if is_component(value):
        return instantiate(value)
    if isinstance(value, Mapping):
        return {name: build_nested(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [build_nested(item) for item in value]
    return value


def find_callable(path: str) -> Callable[..., Any]:
    """What a dotted path names.

    Raises:
        ConfigError: no such module or attribute, with the nearest name; or it can't be called.
    """
    _append_working_folder()
    parts = path.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ConfigError(f"'{path}' is no dotted path; write package.module.name", key=COMPONENT)
    found: Any = _import_first(parts, path)
    name = parts[0]
    for part in parts[1:]:
        found = _attribute(found, name, part, path)
        name = f"{name}.{part}"
    if not callable(found):
        raise ConfigError(f"'{path}' is a {type(found).__name__} and can't be called", key=COMPONENT)
    return found


def _append_working_folder() -> None:
    # Last, so that a file of the user's never hides an installed module of the same name.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _import_first(parts: list[str], path: str) -> ModuleType:
    module = _import(parts[0])
    if module is None:
        known = {info.name for info in pkgutil.iter_modules()}
        hint = did_you_mean(parts[0], known) or "; is its package installed, or its file in the working folder?"
        raise ConfigError(f"'{path}': there is no module '{parts[0]}'{hint}", key=COMPONENT)
    return module


def _attribute(found: Any, name: str, part: str, path: str) -> Any:
    if hasattr(found, part):
        return getattr(found, part)
    if isinstance(found, ModuleType):
        if hasattr(found, "__path__") and (module := _import(f"{name}.{part}")) is not None:
            return module
        submodules = [info.name for info in pkgutil.iter_modules(getattr(found, "__path__", []))]
        known = [known for known in [*dir(found), *submodules] if not known.startswith("_")]
        raise ConfigError(f"'{path}': {name} has no '{part}'{did_you_mean(part, known)}", key=COMPONENT)
    raise ConfigError(f"'{path}': {name} has no '{part}'{did_you_mean(part, dir(found))}", key=COMPONENT)


def _import(name: str) -> ModuleType | None:
    """The module, or None if there is none of that name; a missing import inside it is an error of its own."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            return None
        raise ConfigError(f"importing {name} failed: {error}", key=COMPONENT) from error


def _signature(target: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(target)
    except (ValueError, TypeError):  # some built-ins have none
        return None


def keyword_names(path: Any) -> list[str]:
    """The keywords that a component's callable names; none when it can't be found."""
    try:
        signature = _signature(find_callable(str(path)))
    except ConfigError:
        return []
    return _keywords(signature) if signature is not None else []


def _keywords(signature: inspect.Signature) -> list[str]:
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, parameter in signature.parameters.items() if parameter.kind in by_name]


def component_problems(settings: Settings, path: KeyPath = ()) -> Iterator[Problem]:
    """What is wrong with the components anywhere in `settings`: the path, or keywords that it does not take."""
    value = settings.get(path)
    below: Iterable[Any] = ()
    if isinstance(value, dict):
        below = value
        if isinstance(value.get(COMPONENT), str):
            yield from _problems_of(settings, path, value)
    elif isinstance(value, list):
        below = range(len(value))
    for part in below:
        yield from component_problems(settings, (*path, part))


def _problems_of(settings: Settings, path: KeyPath, value: dict[str, Any]) -> Iterator[Problem]:
    name = value[COMPONENT]
    origin = settings.origin((*path, COMPONENT))
    try:
        target = find_callable(name)
    except ConfigError as error:
        yield Problem(origin.where, dotted(path), error.problems[0].message)
        return
    signature = _signature(target)
    if signature is None or any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        return
    known = _keywords(signature)
    for keyword in value:
        if keyword == COMPONENT or keyword in known:
            continue
        where, key = settings.origin((*path, keyword)).where, dotted((*path, keyword))
        # The argument was written for the component that another line replaced.
        leftover = origin.where != where and origin.where == "command line"
        hint = f"; drop it by ~{key}" if leftover else did_you_mean(keyword, known)
        yield Problem(where, key, f"{name} takes no '{keyword}'{hint}")
