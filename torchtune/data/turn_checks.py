"""What a rendering is checked for: whose words stand where, what is left out, what the template itself marks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torchtune.data.draft import Turn
from torchtune.data.reading import Conversation
from torchtune.data.template import Message
from torchtune.data.tracked import GENERATION, TOOLS, Tracked, plain
from torchtune.errors import DataError

# Fields that stand in a turn's header; all others are what is said.
HEADER_FIELDS = frozenset(["role", "name"])
# The names that templates have for what a model thinks before it speaks; rows have the first.
REASONING = ("reasoning_content", "thinking", "reasoning")
_SHOWN_CHARS = 40


def words_of(text: Tracked, i: int) -> list[tuple[int, int]]:
    """Regions that come from what message i says."""
    return [(s, e) for s, e, label in text.spans if label[0] == i and label[1] not in HEADER_FIELDS]


def refuse_foreign(text: Tracked, turn: Turn) -> None:
    """Raise for a turn in which the words of another message stand."""
    for start, end, (message, name) in text.spans:
        if start < turn.end and end > turn.start and message != turn.message and (message, name) != GENERATION:
            raise DataError(
                f"the chat template writes {name} of {f'message {message + 1}' if message >= 0 else 'the row'} "
                f"into the turn of message {turn.message + 1}: {shown(text[start:end])}"
            )


def left_out(text: Tracked, messages: Sequence[Message], conversation: Conversation) -> set[str]:
    """Notes about what the template does not write; `messages` are all that it was given.

    Raises:
        DataError: it leaves out a message's words. Those of earlier assistant turns it may, as at inference.
    """
    written = {label for _, _, label in text.spans}
    for i, message in enumerate(messages):
        said = _has_words(message["content"]) and (i, "content") not in written
        if said and (message["role"] != "assistant" or i == len(messages) - 1):
            raise DataError(
                f"the chat template leaves out the content of message {i + 1} ({message['role']}); "
                "give dataset.chat_template one that writes it, or change the row"
            )
    last = len(messages) - 1
    notes = set()
    if conversation.tools and TOOLS not in written:
        notes.add("the chat template does not write the rows' tools, so the model does not see them")
    key = next((key for key in REASONING if messages[last].get(key)), None)
    if key is not None and (last, key) not in written:
        notes.add("the chat template does not write reasoning_content, so it is not trained")
    if any(
        "tool_calls" in given and "tool_calls" not in m
        for m, given in zip(messages, conversation.messages, strict=False)
    ):
        notes.add("the chat template writes no tool calls, so they are written as JSON, as words of the turn")
    return notes


def _has_words(content: str | list[dict[str, str]]) -> bool:
    """Whether a content, as text or in parts, says anything."""
    return any(part["text"].strip() for part in content) if isinstance(content, list) else bool(content.strip())


def compare_marks(text: Tracked, turn: Turn) -> str | None:
    """A note on what the template's own generation marks say otherwise about a turn, None if nothing."""
    marked = [(s, e) for s, e, label in text.spans if label == GENERATION and s < turn.end and e > turn.start]
    if not marked:
        return "the template's generation marks leave out an assistant turn, which is trained here"
    start, end = marked[0][0], marked[-1][1]
    last_word = max((end for _, end in words_of(text, turn.message)), default=turn.start)
    if text[min(start, turn.start) : max(start, turn.start)].strip():
        where = "earlier" if start < turn.start else "later"
        return f"the template's generation marks begin {where} than what the model says after the generation prompt"
    if end < last_word or text[turn.end : end].strip():
        return "the template's generation marks end elsewhere than the assistant's turn"
    if forgotten := plain(text[end : turn.end]).strip():
        return f"the template's generation marks leave out the end of turn {forgotten!r}, which is trained here"
    return None


def shown(text: str) -> str:
    """`text` in quotes, cut short."""
    return repr(plain(text) if len(text) <= _SHOWN_CHARS else plain(text)[:_SHOWN_CHARS] + "...")


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of `tokens`, the longest first; nothing if there are none."""
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
