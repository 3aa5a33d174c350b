"""A quick look at rows that are rendered later: read and understood now, rendered only where they are of a new shape.

What a template refuses depends on the roles and keys of a conversation, hardly on its words. So of rows with the
same shape one is rendered and tokenised, and besides each that holds the text of a special token.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torchtune.data.reading import Conversation, Text
from torchtune.data.renderer import Renderer
from torchtune.data.rows import LeftOut, Rows
from torchtune.data.turn_checks import any_of
from torchtune.errors import DataError

Shape = tuple[Any, ...]
EVERY = 2048


def glance(
    rows: Rows, renderer: Renderer, chosen: range, *, known: range, progress: Callable[[int, int], None] | None = None
) -> list[DataError]:
    """What is wrong with the rows `chosen`, as far as a quick look tells.

    Args:
        known: rows that were rendered already; their shapes need no second look.
        progress: is told rows done and rows to do.
    """
    special = any_of(renderer.tokenizer.special_tokens)
    shapes: set[Shape] = set()
    for index in known:
        try:
            shapes.add(_shape(renderer.reading.read(rows[index].record)))
        except DataError:
            continue  # told already
    errors = []
    for index in chosen:
        if progress is not None and index % EVERY == 0:
            progress(index, chosen.stop)
        try:
            row = rows[index]
            try:
                read = renderer.reading.read(row.record)
            except DataError as error:
                raise DataError(error.problem, source=row.source) from error
            shape = _shape(read)
            if shape not in shapes or _holds(read, special):
                shapes.add(shape)
                renderer.samples(row)
        except LeftOut:
            continue
        except DataError as error:
            errors.append(error)
    return errors


def _shape(read: Conversation | Text) -> Shape:
    if isinstance(read, Text):
        return ("text",)
    # An empty message is a shape of its own: templates and masks treat it otherwise.
    messages = [(m["role"], bool(m["content"]), *sorted(m.keys() - {"role", "content"})) for m in read.messages]
    return (bool(read.tools), tuple(read.may_train), *messages)


def _holds(read: Conversation | Text, special: re.Pattern[str]) -> bool:
    texts = [read.text] if isinstance(read, Text) else [message["content"] for message in read.messages]
    return any(special.search(text) for text in texts)
