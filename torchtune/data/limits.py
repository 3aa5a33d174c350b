"""Limits on what a chat template may cost: checked before a huge text is made, and as the rendering goes on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from jinja2.exceptions import TemplateError

MAX_CHARS = 1 << 26
MAX_SECONDS = 10.0
MAX_EXPONENT = 1000
_WIDTH = re.compile(r"\d{6,}")


class TooMuch(TemplateError):
    """The rendering took too long or grew too large."""


def is_small(value: Any) -> bool:
    """Whether a number can be raised to a power, or be one."""
    return isinstance(value, int | float) and abs(value) <= MAX_EXPONENT


def check_size(text: str) -> None:
    """Refuse a text that has grown too large."""
    if len(text) > MAX_CHARS:
        raise TooMuch(f"a text in it grew beyond {MAX_CHARS:,} characters")


def check_format(template: str) -> None:
    """Refuse a format with a width that would make a huge text."""
    if _WIDTH.search(template):
        raise TooMuch("a width in a format is too large")


def check_product(left: Any, right: Any) -> None:
    """Refuse to repeat something until it is huge."""
    for one, other in ((left, right), (right, left)):
        if isinstance(one, str | list | tuple) and isinstance(other, int) and len(one) * other > MAX_CHARS:
            raise TooMuch(f"a text in it grew beyond {MAX_CHARS:,} characters")


def check_arguments(name: str, text: str, args: Iterable[Any], kwargs: Mapping[str, Any] | None = None) -> None:
    """Refuse what would make a huge text before it is made: widths, and replacing little by much."""
    args = (*args, *(kwargs or {}).values())
    # These write the number's worth for each line or tab of the text; others once.
    times = max(text.count("\n"), text.count("\t"), 1) if name in ("indent", "expandtabs") else 1
    if any(isinstance(value, int) and value * times > MAX_CHARS for value in args):
        raise TooMuch(f"the argument of {name} is too large")
    if name == "format":
        check_format(text)
    texts = [value for value in args if isinstance(value, str)]
    if name == "replace" and len(texts) >= 2:
        old, new = texts[-2:]
        times = text.count(old) if old else len(text) + 1
        if times * len(new) > MAX_CHARS:
            raise TooMuch(f"a text in it grew beyond {MAX_CHARS:,} characters")
    lists = [value for value in args if isinstance(value, list | tuple)]
    if name == "join" and any(_joined_size(text, values) > MAX_CHARS for values in lists):
        raise TooMuch(f"a text in it grew beyond {MAX_CHARS:,} characters")


def _joined_size(separator: str, values: Iterable[Any]) -> int:
    return sum(len(separator) + (len(value) if isinstance(value, str) else 0) for value in values)
