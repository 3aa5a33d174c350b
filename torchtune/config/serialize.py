"""Params back to YAML: reading the text again gives equal params."""

from __future__ import annotations

import re
from typing import Any

import yaml

from torchtune.config.keys import as_plain

# Text that YAML, OmegaConf and we read as text when it stands unquoted; all other text is quoted.
_PLAIN = re.compile(r"(?:[A-Za-z_/]|\./)[\w./-]*", re.ASCII)
_WORDS = {"true", "false", "yes", "no", "on", "off", "y", "n", "null", "none", "nan", "inf"}
_INTERPOLATION = re.compile(r"(\\*)\$\{")


class _Dumper(yaml.SafeDumper):
    """Quotes text unless it can only be text."""

    def ignore_aliases(self, data: Any) -> bool:
        """Values that are one object in memory are written out each time."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = _PLAIN.fullmatch(text) and text.lower() not in _WORDS
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _represent_text)


def resolved(params: Any) -> dict[str, Any]:
    """Every key of `params` with its value, nested ones as mappings, as YAML and JSON can hold them."""
    plain = as_plain(params)
    assert isinstance(plain, dict)
    return plain


def to_yaml(params: Any) -> str:
    """The YAML text of `params`, all keys in the order of their declaration; write it as UTF-8."""
    text: str = yaml.dump(
        _escaped(resolved(params)), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000
    )
    return text


def _escaped(value: Any) -> Any:
    """`value` with every `${` kept from being read as an interpolation."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if isinstance(value, str):
        return _INTERPOLATION.sub(lambda match: match[1] * 2 + r"\${", value)
    return value
