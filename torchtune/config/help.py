"""`tune run RECIPE --help`: every key with its type, default and one line, read off the dataclass."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

from torchtune.config.keys import Key, as_plain, is_params_class, keys_of

_USAGE = """\
usage: tune run RECIPE [--config NAME_OR_PATH] [key=value ...] [~key ...]

  --config X    read options from a YAML file; tune ls lists the configs that come with the package
  key=value     set a key: nested.key=1, list=[a,b], mapping='{a: 1}'; goes before what the config says
  ~key          drop a key of the config
"""
_WIDTH = 110


def help_text(cls: type) -> str:
    """The whole help, in groups: the recipe's own keys, those it inherits, then one group per nested mapping."""
    return "\n".join([_USAGE, *_groups(cls)])


def _groups(cls: type, prefix: str = "") -> Iterator[str]:
    keys = keys_of(cls)
    owners = [base for base in cls.__mro__ if any(key.owner is base for key in keys.values())]
    for owner in owners:
        yield _heading(prefix.rstrip("."), owner)
        for name, key in keys.items():
            if key.owner is owner:
                yield _entry(f"{prefix}{name}", key)
        yield ""
    for name, key in keys.items():
        nested = key.type.nested
        item = key.type.item((list, tuple))
        if nested is not None:
            yield from _groups(nested, f"{prefix}{name}.")
        elif item is not None and item.nested is not None:
            yield from _groups(item.nested, f"{prefix}{name}[].")


def _heading(prefix: str, owner: type) -> str:
    line = (inspect.getdoc(owner) or "").partition("\n")[0]
    return ": ".join(part for part in (prefix, line) if part)


def _entry(name: str, key: Key) -> str:
    head = f"  {name}  ({key.type}; {_default_text(key)})"
    return "\n".join(
        [head, *textwrap.wrap(key.description, _WIDTH, initial_indent="      ", subsequent_indent="      ")]
    )


def _default_text(key: Key) -> str:
    if key.required:
        return "required"
    if is_params_class(type(key.default)):
        return "default: see below"
    return f"default: {inline(key.default)}"


def inline(value: Any) -> str:
    """A value as it would be typed on one line of YAML."""
    text: str = yaml.safe_dump(as_plain(value), default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("\n").removesuffix("...").strip()
