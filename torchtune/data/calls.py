"""Tool calls: the one shape in which rows are read, and the one that a template can write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from torchtune.data.template import ChatTemplate, Message
from torchtune.errors import DataError

# How a template gets the calls of a message: `tool_calls` with arguments as an object, which is what most
# are written for; with arguments as JSON text; or, where it writes no calls at all, as JSON in the content.
CALLS_AS = ("object", "text", "content")

_FUNCTION = {"name": "probe_f", "arguments": {"probe_k": "probe_v"}}
CALL_PROBE: list[Message] = [
    {"role": "user", "content": "probe"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "probe0001", "type": "function", "function": _FUNCTION}],
    },
]
TOOL_PROBE: Message = {"role": "tool", "tool_call_id": "probe0001", "name": "probe_f", "content": "probe-t"}


def calls_as(template: ChatTemplate) -> str:
    """One of CALLS_AS, found by a made-up call."""
    try:
        text = template.render_tracked(CALL_PROBE)
    except DataError:
        return "text" if _renders(template, rewrite_calls(CALL_PROBE, "text")) else "object"
    if not any(name == "tool_calls" for _, _, (_, name) in text.spans):
        return "content"
    return "text" if "{'probe_k': 'probe_v'}" in text else "object"  # Python's own form of an object


def rewrite_calls(messages: Sequence[Message], form: str) -> list[Message]:
    """The messages with their calls in another form."""
    if form == "object":
        return list(messages)
    rewrite = _in_content if form == "content" else _with_text_arguments
    return [rewrite(message) if "tool_calls" in message else message for message in messages]


def _renders(template: ChatTemplate, messages: Sequence[Message]) -> bool:
    try:
        template.render(messages)
    except DataError:
        return False  # it misses something else; a row's own rendering says what
    return True


def _with_text_arguments(message: Message) -> Message:
    return {**message, "tool_calls": [_with_text(call) for call in message["tool_calls"]]}


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _in_content(message: Message) -> Message:
    calls = [call["function"] for call in message["tool_calls"]]
    lines = [json.dumps({"name": call["name"], "arguments": call["arguments"]}, ensure_ascii=False) for call in calls]
    content = "\n".join([message["content"], *lines] if message["content"] else lines)
    return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": content}
