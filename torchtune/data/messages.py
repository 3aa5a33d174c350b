"""Rows of every format as messages: one spelling of roles, text content, and which turns may be trained.

What is done here to a row, all of it, in order: role names become those of chat templates; a list of text
parts becomes one text; null keys are dropped (tables fill rows with them); tool calls become OpenAI's shape
with their arguments as an object; `weight` and `train` become a flag and are not rendered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchtune.data.recognise import Schema, check_record
from torchtune.errors import DataError, did_you_mean

ROLES = {
    "system": "system", "developer": "developer", "user": "user", "assistant": "assistant", "tool": "tool",
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "ai": "assistant", "function": "tool", "observation": "tool", "tool_response": "tool", "ipython": "ipython",
    "function_response": "tool", "function_call": "function_call", "tool_call": "function_call",
}  # fmt: skip
FLAGS = ("weight", "train")
# Between messages that are joined on request (dataset.merge_turns, dataset.system=fold).
SEPARATOR = "\n\n"

# How Stanford Alpaca (Taori et al., 2023) words a row for a model without a chat template.
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


@dataclass(frozen=True)
class Conversation:
    """A chat, ready for a template.

    Attributes:
        messages: `role` and `content` (always text), and what else a message had.
        may_train: by message; true for assistant turns that no flag takes out.
        tools: schemas that the template is given.
        plain: prompt and completion, if the row was made of strings, for models without a template.
    """

    messages: list[dict[str, Any]]
    may_train: list[bool]
    tools: list[Any] | None = None
    plain: tuple[str, str] | None = None


@dataclass(frozen=True)
class Text:
    """A text to go on with, as in pretraining."""

    text: str


@dataclass(frozen=True)
class Reading:
    """How rows become messages.

    Attributes:
        schema: what a row is.
        roles: further role names, to one of ROLES.
        fold_system: put a system message before the first user message's words.
        merge_turns: join messages of the same role that follow one another.
    """

    schema: Schema
    roles: Mapping[str, str]
    fold_system: bool = False
    merge_turns: bool = False

    def read(self, record: Any) -> Conversation | Text:
        """One row. Raises DataError, without source, for a row that can't be trained on."""
        check_record(record, self.schema)
        get = self.schema.get
        if self.schema.format == "text":
            return Text(_needed_text(get(record, "text"), "text"))
        tools = read_tools(get(record, "tools"))
        conversation = self._conversation(record, tools)
        _refuse_empty(conversation)
        if self.merge_turns:
            conversation = merge_turns(conversation)
        return fold_system(conversation) if self.fold_system else conversation

    def _conversation(self, record: Any, tools: list[Any] | None) -> Conversation:
        get, schema = self.schema.get, self.schema
        system = [{"role": "system", "content": text}] if (text := _optional_text(get(record, "system"))) else []
        if schema.format == "alpaca":
            instruction = _needed_text(get(record, "instruction"), "instruction")
            given = _optional_text(get(record, "input"))
            completion = _needed_text(get(record, "output"), "output")
            prompt = instruction + SEPARATOR + given if given else instruction
            wording = ALPACA_PROMPT_WITH_INPUT if given else ALPACA_PROMPT
            plain = wording.replace("{instruction}", instruction).replace("{input}", given)
            return _exchange(system, prompt, completion, tools, plain=plain)
        if schema.format == "prompt_completion":
            prompt, completion = get(record, "prompt"), get(record, "completion")
            if isinstance(prompt, list) and isinstance(completion, list):
                context, _ = read_messages([*system, *prompt], self.roles)
                answer, may_train = read_messages(completion, self.roles, first=len(context))
                return Conversation([*context, *answer], [False] * len(context) + may_train, tools)
            prompt, completion = _needed_text(prompt, "prompt"), _needed_text(completion, "completion")
            return _exchange(system, prompt, completion, tools, plain=prompt)
        listed = get(record, "messages" if schema.format == "messages" else "conversations")
        if not isinstance(listed, list):
            raise DataError(f"{_column(schema)} must be a list of messages, not {_shown(listed)}")
        messages, may_train = read_messages([*system, *listed], self.roles)
        return Conversation(messages, may_train, tools)


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


def merge_turns(conversation: Conversation) -> Conversation:
    """Join messages of the same role in a row by SEPARATOR; calls, answers to tools, and mixed flags stay apart."""
    messages: list[dict[str, Any]] = []
    may_train: list[bool] = []
    for message, flag in zip(conversation.messages, conversation.may_train, strict=True):
        before = messages[-1] if messages else {}
        joins = before.keys() == message.keys() == {"role", "content"} and before["role"] == message["role"] != "tool"
        if joins and may_train[-1] == flag:
            messages[-1] = {**before, "content": before["content"] + SEPARATOR + message["content"]}
        else:
            messages.append(message)
            may_train.append(flag)
    return Conversation(messages, may_train, conversation.tools, conversation.plain)


def fold_system(conversation: Conversation) -> Conversation:
    """Put a leading system message before the words of the first user message, with SEPARATOR between."""
    messages, may_train = conversation.messages, conversation.may_train
    if not messages or messages[0]["role"] != "system":
        return conversation
    if len(messages) < 2 or messages[1]["role"] != "user":
        raise DataError("the system message can't be folded: no user message follows it")
    folded = {**messages[1], "content": messages[0]["content"] + SEPARATOR + messages[1]["content"]}
    return Conversation([folded, *messages[2:]], may_train[1:], conversation.tools, conversation.plain)


def read_tools(tools: Any) -> list[Any] | None:
    """Tool schemas, from a list or its JSON text; None where there are none."""
    if isinstance(tools, str):
        tools = _json(tools, "tools") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"tools must be a list of objects, not {_shown(tools)}")
    return [_without_nulls(tool) for tool in tools]


def _message(message: Any, roles: Mapping[str, str]) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise DataError(f"a message must be an object with role and content, not {_shown(message)}")
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
        raise DataError(f"tool_calls must be a list, not {_shown(calls)}")
    return [_tool_call(call) for call in calls]


def _tool_call(call: Any) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise DataError(f"a tool call must be an object, not {_shown(call)}")
    call = {key: value for key, value in call.items() if value is not None}
    if isinstance(call.get("function"), dict):
        function = {key: value for key, value in call["function"].items() if value is not None}
    else:  # name and arguments without a wrapper
        function = {key: call.pop(key) for key in ("name", "arguments", "parameters") if key in call}
        function = {"arguments" if key == "parameters" else key: value for key, value in function.items()}
    if not isinstance(function.get("name"), str):
        raise DataError(f"a tool call needs the function's name: {_shown(call)}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(arguments, f"the arguments of {function['name']}") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise DataError(f"the arguments of {function['name']} must be an object, not {_shown(arguments)}")
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def _may_train(message: Mapping[str, Any], role: str) -> bool:
    """Whether the message is an assistant's that `weight` and `train` leave in."""
    flags = {name: message[name] for name in FLAGS if message.get(name) is not None}
    for name, value in flags.items():
        if value not in (0, 1):
            raise DataError(f"{name} must be 0 or 1, true or false, not {_shown(value)}")
    if role != "assistant":
        # `weight: 1` stands on every message of some files; `train: true` is only written when it is meant.
        if flags.get("train"):
            raise DataError(f"train: true on a {role} message: only assistant turns are trained, or train_on=all")
        return False
    return all(flags.values())


def _exchange(
    system: list[dict[str, Any]], prompt: str, completion: str, tools: list[Any] | None, *, plain: str
) -> Conversation:
    turns = [*system, {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return Conversation(turns, [turn["role"] == "assistant" for turn in turns], tools, (plain, completion))


def _refuse_empty(conversation: Conversation) -> None:
    if not any(m["content"].strip() or m.keys() - {"role", "content", "name"} for m in conversation.messages):
        raise DataError("the row is empty: none of its messages has words")


def _needed_text(value: Any, name: str) -> str:
    text = _text(value, name)
    if not text.strip() and name not in ("completion", "output"):
        raise DataError(f"{name} is empty")
    return text


def _optional_text(value: Any) -> str:
    """The text, and "" for what files write where there is none: null, nothing, spaces."""
    text = "" if value is None else _text(value, "a text column")
    return text if text.strip() else ""


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} must be text, not {_shown(value)}")
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
        raise DataError(f"{name} must be JSON, which this is not: {_shown(text)}") from error


def _without_nulls(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool without null keys at its two outer levels; within `parameters` a null can be meant."""
    tool = {key: value for key, value in tool.items() if value is not None}
    if isinstance(tool.get("function"), dict):
        tool["function"] = {key: value for key, value in tool["function"].items() if value is not None}
    return tool


def _column(schema: Schema) -> str:
    return next(iter(schema.columns.values()))


def _shown(value: Any) -> str:
    text = "null" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:60] + "..."
