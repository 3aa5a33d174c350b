"""Messages of every spelling as those of chat templates.

What is done to a message, all of it: its role gets the name that templates know; a list of text parts becomes
one text; null keys are dropped (tables fill rows with them); tool calls become OpenAI's shape with their
arguments as an object; `weight` and `train` become a flag and are not rendered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torchtune.errors import DataError, did_you_mean

ROLES = {
    "system": "system", "developer": "developer", "user": "user", "assistant": "assistant", "tool": "tool",
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "ai": "assistant", "function": "tool", "observation": "tool", "tool_response": "tool", "ipython": "ipython",
    "function_response": "tool", "function_call": "function_call", "tool_call": "function_call",
}  # fmt: skip
FLAGS = ("weight", "train")


def read_messages(
    listed: list[Any], roles: Mapping[str, str], *, first: int = 0
) -> tuple[list[dict[str, Any]], list[bool]]:
    """Messages in one spelling, and which of them may be trained.

    Args:
        listed: messages with `role` and `content`, or `from` and `value`.
        roles: further role names.
        first: number of the first message, for errors.
    """
    if not listed:
        raise DataError("the list of messages is empty")
    messages, may_train = [], []
    for number, message in enumerate(listed, start=first + 1):
        try:
            read = _message(message, roles)
            may_train.append(_may_train(message, read["role"]))
        except DataError as error:
            raise DataError(f"message {number}: {error.problem}") from error
        messages.append(read)
    return messages, may_train


def read_tools(tools: Any) -> list[Any] | None:
    """Tool schemas, from a list or its JSON text; None where there are none."""
    if isinstance(tools, str):
        tools = _json(tools, "tools") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"tools must be a list of objects, not {shown(tools)}")
    return [_without_nulls(tool) for tool in tools]


def _message(message: Any, roles: Mapping[str, str]) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise DataError(f"a message must be an object with role and content, not {shown(message)}")
    names = ("role", "content") if message.get("role") is not None else ("from", "value")
    role = _role(message.get(names[0]), roles)
    rest = {key: value for key, value in message.items() if value is not None and key not in (*names, *FLAGS)}
    content = message.get(names[1])
    if role == "function_call":
        calls = _json(content, "a function call") if isinstance(content, str) else content
        rest["tool_calls"] = calls if isinstance(calls, list) else [calls]
        role, content = "assistant", ""
    if calls := rest.pop("tool_calls", None):
        rest["tool_calls"] = _tool_calls(calls)
    if content is None and not rest.get("tool_calls") and not rest.get("reasoning_content"):
        raise DataError(f"the {role} message has no content")
    # An empty text where a call stands alone: templates print a null as "None" and stumble over a missing key.
    return {"role": role, "content": "" if content is None else _content(content), **rest}


def _role(role: Any, roles: Mapping[str, str]) -> str:
    known = {**ROLES, **roles}
    if not isinstance(role, str):
        raise DataError("a message needs a role")
    name = known.get(role) or known.get(role.strip().lower())
    if name is None:
        raise DataError(f"unknown role '{role}'{did_you_mean(role, known)}; other names are given by dataset.roles")
    return ROLES.get(name, name)


def _content(content: Any) -> str:
    """Text, or the texts of a list of parts, one after the other."""
    if isinstance(content, list):
        return "".join(_part(part) for part in content)
    return _text(content, "content")


def _part(part: Any) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text" and part.get("text") is not None:
        return _text(part["text"], "text")
    if isinstance(part, dict) and part.get("type", "text") != "text":
        raise DataError(f"the content has a part of type '{part['type']}'; this checkpoint reads text alone")
    return _text(part, "a part of content")


def _tool_calls(calls: Any) -> list[dict[str, Any]]:
    """OpenAI's shape: {"type": "function", "function": {"name", "arguments": object}, ...}."""
    if not isinstance(calls, list):
        raise DataError(f"tool_calls must be a list, not {shown(calls)}")
    return [_tool_call(call) for call in calls]


def _tool_call(call: Any) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise DataError(f"a tool call must be an object, not {shown(call)}")
    call = {key: value for key, value in call.items() if value is not None}
    if isinstance(call.get("function"), dict):
        function = {key: value for key, value in call["function"].items() if value is not None}
    else:  # name and arguments without a wrapper
        function = {key: call.pop(key) for key in ("name", "arguments", "parameters") if key in call}
        function = {"arguments" if key == "parameters" else key: value for key, value in function.items()}
    if not isinstance(function.get("name"), str):
        raise DataError(f"a tool call needs the function's name: {shown(call)}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(arguments, f"the arguments of {function['name']}") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise DataError(f"the arguments of {function['name']} must be an object, not {shown(arguments)}")
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def _may_train(message: Mapping[str, Any], role: str) -> bool:
    """Whether the message is an assistant's that `weight` and `train` leave in."""
    flags = {name: message[name] for name in FLAGS if message.get(name) is not None}
    for name, value in flags.items():
        if value not in (0, 1):
            raise DataError(f"{name} must be 0 or 1, true or false, not {shown(value)}")
    if role != "assistant":
        # `weight: 1` stands on every message of some files; `train: true` is only written when it is meant.
        if flags.get("train"):
            raise DataError(f"train: true on a {role} message: only assistant turns are trained, or train_on=all")
        return False
    return all(flags.values())


def needed_text(value: Any, name: str) -> str:
    text = _text(value, name)
    if not text.strip() and name not in ("completion", "output"):
        raise DataError(f"{name} is empty")
    return text


def optional_text(value: Any) -> str:
    """The text, and "" for what files write where there is none: null, nothing, spaces."""
    text = "" if value is None else _text(value, "a text column")
    return text if text.strip() else ""


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} must be text, not {shown(value)}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{name} holds half of a surrogate pair ({value[error.start]!r})") from error
    return value


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} must be JSON, which this is not: {shown(text)}") from error


def _without_nulls(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool without null keys at its two outer levels; within `parameters` a null can be meant."""
    tool = {key: value for key, value in tool.items() if value is not None}
    if isinstance(tool.get("function"), dict):
        tool["function"] = {key: value for key, value in tool["function"].items() if value is not None}
    return tool


def shown(value: Any) -> str:
    text = "null" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:60] + "..."
