"""Text that remembers which of its characters came from which field of which message.

A chat template is given such texts in place of plain ones. Whatever it does with them (adds, slices, trims,
splits, replaces, joins) gives such texts again, so that in the end each character of the rendering is known
to be the template's own or some message's. The text itself is never another than a plain str would give.

Where an operation can't be followed character by character (`title`, a format with widths), the whole result
counts as coming from every field that went in: never too little.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, SupportsIndex

# Which message, and which of its fields. Messages count from 0; TOOLS and GENERATION are not messages.
Label = tuple[int, str]
Span = tuple[int, int, Label]

TOOLS: Label = (-1, "tools")
# What the template itself marks by {% generation %}; it can lie over the spans of fields.
GENERATION: Label = (-2, "generation")

_SLOT = re.compile("\ue000(\\d+)\ue001")


class Tracked(str):
    """A str with `spans`: (start, end, label), sorted by start."""

    __slots__ = ("spans",)
    spans: tuple[Span, ...]

    def __new__(cls, text: str, spans: tuple[Span, ...] = ()) -> Tracked:
        self = super().__new__(cls, text)
        self.spans = spans
        return self

    def __str__(self) -> str:
        return self  # str(x), which Jinja calls on all that it prints, keeps the spans

    def __format__(self, spec: str) -> str:
        return self if not spec else covered(super().__format__(spec), [self])

    def __add__(self, other: str) -> Tracked:
        return concat((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> Tracked:
        return concat((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> Tracked:
        return concat([self] * times.__index__())

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> Tracked:
        return formatted(lambda given: str.__mod__(self, given), self, values)

    def __rmod__(self, template: Any) -> Any:
        return formatted(lambda given: str.__mod__(template, given), template, self)

    def __iter__(self) -> Iterator[str]:
        return (self.cut(place, place + 1) for place in range(len(self)))

    def __getitem__(self, key: SupportsIndex | slice) -> Tracked:
        if not isinstance(key, slice):
            place = range(len(self))[key]
            return self.cut(place, place + 1)
        start, stop, step = key.indices(len(self))
        if step == 1:
            return self.cut(start, max(start, stop))
        return concat(self.cut(place, place + 1) for place in range(start, stop, step))

    def cut(self, start: int, end: int) -> Tracked:
        """Characters `start` to `end`, both within the text."""
        kept = [(s, e, label) for s, e, label in self.spans if s < end and e > start]
        spans = tuple((max(s, start) - start, min(e, end) - start, label) for s, e, label in kept)
        return Tracked(super().__getitem__(slice(start, end)), spans)

    def strip(self, chars: str | None = None) -> Tracked:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> Tracked:
        return self.cut(len(self) - len(super().lstrip(chars)), len(self))

    def rstrip(self, chars: str | None = None) -> Tracked:
        return self.cut(0, len(super().rstrip(chars)))

    def removeprefix(self, prefix: str, /) -> Tracked:
        return self.cut(len(self) - len(super().removeprefix(prefix)), len(self))

    def removesuffix(self, suffix: str, /) -> Tracked:
        return self.cut(0, len(super().removesuffix(suffix)))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(super().split(sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(super().rsplit(sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        whole = super().splitlines(keepends=True)
        shown = super().splitlines(keepends=keepends)
        ends = [0]
        for line in whole:
            ends.append(ends[-1] + len(line))
        return [self.cut(start, start + len(line)) for start, line in zip(ends, shown, strict=False)]

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        return self._parted(super().partition(sep))

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        return self._parted(super().rpartition(sep))

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> Tracked:
        if not old:
            return covered(super().replace(old, new, count), [self, new])
        # split() cuts at the same places as replace(): from the left, without overlap.
        return join(new, self.split(old, count))

    def join(self, parts: Iterable[str], /) -> Tracked:
        return join(self, parts)

    def lower(self) -> Tracked:
        return self._mapped(str.lower)

    def upper(self) -> Tracked:
        return self._mapped(str.upper)

    def casefold(self) -> Tracked:
        return self._mapped(str.casefold)

    def swapcase(self) -> Tracked:
        return self._mapped(str.swapcase)

    def title(self) -> Tracked:
        return self._mapped(str.title)

    def capitalize(self) -> Tracked:
        return self._mapped(str.capitalize)

    def translate(self, table: Any, /) -> Tracked:
        return self._mapped(lambda text: str.translate(text, table))

    def expandtabs(self, tabsize: SupportsIndex = 8) -> Tracked:
        return self._mapped(lambda text: str.expandtabs(text, tabsize.__index__()))

    def center(self, width: SupportsIndex, fillchar: str = " ", /) -> Tracked:
        return self._padded(str.center, width, fillchar)

    def ljust(self, width: SupportsIndex, fillchar: str = " ", /) -> Tracked:
        return self._padded(str.ljust, width, fillchar)

    def rjust(self, width: SupportsIndex, fillchar: str = " ", /) -> Tracked:
        return self._padded(str.rjust, width, fillchar)

    def zfill(self, width: SupportsIndex, /) -> Tracked:
        return covered(super().zfill(width), [self])

    def _located(self, parts: list[str], sep: str | None) -> list[str]:
        """`parts` of this text, which follow one another with `sep` or white space between, as cuts of it."""
        cuts: list[str] = []
        place = 0
        for part in parts:
            # Between parts lies white space alone, and none begins with it, so the first match is the part.
            start = str.find(self, part, place) if sep is None else place
            cuts.append(self.cut(start, start + len(part)))
            place = start + len(part) + len(sep or "")
        return cuts

    def _parted(self, parts: tuple[str, str, str]) -> tuple[str, str, str]:
        first, second = len(parts[0]), len(parts[0]) + len(parts[1])
        return self.cut(0, first), self.cut(first, second), self.cut(second, len(self))

    def _mapped(self, change: Callable[[str], str]) -> Tracked:
        """`change` applied piece by piece between the spans' edges, if that gives what the whole gives."""
        whole = change(plain(self))
        edges = sorted({0, len(self), *(edge for start, end, _ in self.spans for edge in (start, end))})
        pieces = [change(plain(self.cut(a, b))) for a, b in pairwise(edges)]
        if "".join(pieces) != whole:
            return covered(whole, [self])
        moved, place = {0: 0}, 0
        for edge, piece in zip(edges[1:], pieces, strict=True):
            place = moved[edge] = place + len(piece)
        return Tracked(whole, tuple((moved[start], moved[end], label) for start, end, label in self.spans))

    def _padded(self, pad: Callable[..., str], width: SupportsIndex, fillchar: str) -> Tracked:
        padded = pad(plain(self), width, fillchar)
        left = len(pad("\0" * len(self), width, fillchar).partition("\0")[0]) if self else 0
        return concat((padded[:left], self, padded[left + len(self) :]))


def plain(text: str) -> str:
    """The same text as a str without spans."""
    return str.__getitem__(text, slice(None))


def mark(text: str, label: Label) -> Tracked:
    """`text`, all of it from the field `label`."""
    return Tracked(text, ((0, len(text), label),) if text else ())


def mark_all(value: Any, label: Label) -> Any:
    """`value` with every text in it marked, keys of objects too; what has no text stays as it is."""
    if isinstance(value, str):
        return mark(value, label)
    if isinstance(value, dict):
        return {mark_all(key, label): mark_all(each, label) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [mark_all(each, label) for each in value]
    return value


def concat(parts: Iterable[str]) -> Tracked:
    """All parts, one after the other."""
    parts = parts if isinstance(parts, list | tuple) else list(parts)
    spans: list[Span] = []
    place = 0
    for part in parts:
        if isinstance(part, Tracked) and part.spans:
            first, end, label = part.spans[0]
            if spans and spans[-1][1:] == (first + place, label):  # goes on where the last one ended
                spans[-1] = (spans[-1][0], end + place, label)
            else:
                spans.append((first + place, end + place, label))
            spans.extend((start + place, end + place, label) for start, end, label in part.spans[1:])
        place += len(part)
    return Tracked("".join(parts), tuple(spans))


def join(separator: str, parts: Iterable[str]) -> Tracked:
    """All parts with the separator between them."""
    joined: list[str] = []
    for part in parts:
        joined += (separator, part)
    return concat(joined[1:])


def covered(text: str, sources: Iterable[Any]) -> Tracked:
    """`text`, as a whole from every field that a text among `sources` comes from."""
    labels = sorted({label for source in sources for label in labels_in(source)})
    return Tracked(text, tuple((0, len(text), label) for label in labels) if text else ())


def labels_in(value: Any) -> set[Label]:
    """The fields that the texts in `value` come from."""
    if isinstance(value, Tracked):
        return {label for _, _, label in value.spans}
    if isinstance(value, Mapping):
        return {label for pair in value.items() for each in pair for label in labels_in(each)}
    if isinstance(value, list | tuple):
        return {label for each in value for label in labels_in(each)}
    return set()


def formatted(call: Callable[[Any], str], template: str, values: Any) -> Tracked:
    """What `call(values)` gives: `template` with values filled in."""
    text = call(values)
    slots: list[str] = []

    def slot(value: Any) -> Any:
        if isinstance(value, Tracked):
            slots.append(value)
            return f"\ue000{len(slots) - 1}\ue001"
        if isinstance(value, dict):
            return {key: slot(each) for key, each in value.items()}
        return type(value)(slot(each) for each in value) if isinstance(value, list | tuple) else value

    parts = _SLOT.split(call(slot(values)))
    result = concat([slots[int(part)] if index % 2 else part for index, part in enumerate(parts)])
    if result == text and not isinstance(template, Tracked):
        return result
    return covered(text, [template, values])
