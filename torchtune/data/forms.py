"""The forms in which a chat template reads what a message holds, found out by trying and applied to messages."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torchtune.data.calls import calls_as, rewrite_calls
from torchtune.data.template import ChatTemplate, Message
from torchtune.data.turn_checks import REASONING, words_of
from torchtune.errors import DataError

# A made-up exchange, by which a template is asked how it reads and writes.
PROBE: list[Message] = [{"role": "user", "content": "probe-u"}, {"role": "assistant", "content": "probe-a"}]


class Forms:
    """Rewrites messages for one template: content as a list of parts, reasoning under its key, calls in its form.

    Args:
        template: asked by made-up messages, when a form is first needed.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._content_in_parts = not _writes(template, PROBE) and _writes(template, _in_parts(PROBE))
        self._reasoning = _reasoning_key(template.source)
        self._calls_as: str | None = None

    def apply(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as the template reads them."""
        messages = list(messages)
        if any("tool_calls" in message for message in messages):
            if self._calls_as is None:
                self._calls_as = calls_as(self._template)
            messages = rewrite_calls(messages, self._calls_as)
        if self._reasoning != REASONING[0]:
            messages = [_renamed(message, REASONING[0], self._reasoning) for message in messages]
        return _in_parts(messages) if self._content_in_parts else messages


def _writes(template: ChatTemplate, messages: list[Message]) -> bool:
    """Whether the template writes the words of both messages."""
    try:
        text = template.render_tracked(messages)
    except DataError:
        return False
    return bool(words_of(text, 0)) and bool(words_of(text, 1))


def _in_parts(messages: Sequence[Message]) -> list[Message]:
    return [{**m, "content": [{"type": "text", "text": m["content"]}] if m["content"] else []} for m in messages]


def _reasoning_key(source: str) -> str:
    """The name under which the template looks for reasoning; where it looks for none, the usual one."""
    return next((key for key in REASONING if re.search(rf"(\.|['\"]){key}\b", source)), REASONING[0])


def _renamed(message: Message, name: str, other: str) -> Message:
    return {other if key == name else key: value for key, value in message.items()}
