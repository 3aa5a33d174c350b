"""Rows of every format as conversations or texts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchtune.data.messages import needed_text, optional_text, read_messages, read_tools, shown
from torchtune.data.recognise import Schema, check_record
from torchtune.errors import DataError

# Between messages that are joined on request (dataset.merge_turns, dataset.system=fold).
SEPARATOR = "\n\n"

_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")

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
            return Text(needed_text(get(record, "text"), "text"))
        tools = read_tools(get(record, "tools"))
        conversation = self._conversation(record, tools)
        _refuse_empty(conversation)
        if self.merge_turns:
            conversation = merge_turns(conversation)
        return fold_system(conversation) if self.fold_system else conversation

    def _conversation(self, record: Any, tools: list[Any] | None) -> Conversation:
        get, schema = self.schema.get, self.schema
        system = [{"role": "system", "content": text}] if (text := optional_text(get(record, "system"))) else []
        if schema.format == "alpaca":
            instruction = needed_text(get(record, "instruction"), "instruction")
            given = optional_text(get(record, "input"))
            completion = needed_text(get(record, "output"), "output")
            prompt = instruction + SEPARATOR + given if given else instruction
            wording = ALPACA_PROMPT_WITH_INPUT if given else ALPACA_PROMPT
            plain = wording.replace("{instruction}", instruction).replace("{input}", given)
            return _exchange(system, prompt, completion, tools, plain=plain)
        if schema.format == "prompt_completion":
            prompt, completion = (listed_messages(get(record, name)) for name in ("prompt", "completion"))
            if isinstance(prompt, list) and isinstance(completion, list):
                context, _ = read_messages([*system, *prompt], self.roles)
                answer, may_train = read_messages(completion, self.roles, first=len(context))
                return Conversation([*context, *answer], [False] * len(context) + may_train, tools)
            prompt, completion = needed_text(prompt, "prompt"), needed_text(completion, "completion")
            return _exchange(system, prompt, completion, tools, plain=prompt)
        if schema.format == "preference":
            return self._chosen(record, system, tools)
        listed = listed_messages(get(record, "messages" if schema.format == "messages" else "conversations"))
        if not isinstance(listed, list):
            raise DataError(f"{_column(schema)} must be a list of messages, not {shown(listed)}")
        messages, may_train = read_messages([*system, *listed], self.roles)
        return Conversation(messages, may_train, tools)

    def _chosen(self, record: Any, system: list[dict[str, Any]], tools: list[Any] | None) -> Conversation:
        """The better answer of a preference row, as what a fine-tune learns from it."""
        prompt, chosen = (listed_messages(self.schema.get(record, name)) for name in ("prompt", "chosen"))
        if isinstance(chosen, str) and prompt is None:
            chosen = transcript(chosen)
        if isinstance(chosen, str):
            prompt = needed_text(prompt, "prompt")
            return _exchange(system, prompt, needed_text(chosen, "chosen"), tools, plain=prompt)
        if not isinstance(chosen, list):
            raise DataError(f"chosen must be text or a list of messages, not {shown(chosen)}")
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        answer, may_train = read_messages(chosen, self.roles, first=len(prompt or []))
        if not prompt:
            context, _ = read_messages(system, self.roles) if system else ([], [])
            return Conversation([*context, *answer], [False] * len(context) + may_train, tools)
        context, _ = read_messages([*system, *prompt], self.roles)
        if answer[: len(context)] == context:  # some files write the prompt into chosen once more
            answer, may_train = answer[len(context) :], may_train[len(context) :]
        return Conversation([*context, *answer], [False] * len(context) + may_train, tools)


def listed_messages(value: Any) -> Any:
    """A list of messages that stands as JSON text, as CSV files have it; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value  # a text that begins like one
    return value


def transcript(text: str) -> list[dict[str, str]]:
    """The messages of a text in the form of Anthropic's HH-RLHF (Bai et al., 2022): `Human:` and `Assistant:` turns.

    Raises:
        DataError: it does not have that form.
    """
    parts = _SPEAKER.split(text)
    if parts[0].strip() or len(parts) < 3:
        raise DataError(
            "chosen is a text without a prompt, and not of the form 'Human: ... Assistant: ...'; add a column prompt, "
            "or name it by dataset.columns"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": words.strip()}
        for speaker, words in zip(parts[1::2], parts[2::2], strict=True)
    ]


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


def _exchange(
    system: list[dict[str, Any]], prompt: str, completion: str, tools: list[Any] | None, *, plain: str
) -> Conversation:
    turns = [*system, {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return Conversation(turns, [turn["role"] == "assistant" for turn in turns], tools, (plain, completion))


def _refuse_empty(conversation: Conversation) -> None:
    if not any(m["content"].strip() or m.keys() - {"role", "content", "name"} for m in conversation.messages):
        raise DataError("the row is empty: none of its messages has words")


def _column(schema: Schema) -> str:
    return next(iter(schema.columns.values()))
