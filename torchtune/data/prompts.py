"""Prompts as inference has them: messages by the template up to where the model speaks, texts as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from torchtune.data.encoding import Encoder
from torchtune.data.forms import Forms
from torchtune.data.messages import needed_text, optional_text, read_messages, read_tools
from torchtune.data.options import SpecialTokensInContent
from torchtune.data.reading import ALPACA_PROMPT, ALPACA_PROMPT_WITH_INPUT, SEPARATOR, listed_messages
from torchtune.data.recognise import COMPLETIONS, PROMPTS
from torchtune.data.rows import Row
from torchtune.data.template import ChatTemplate
from torchtune.data.tracked import Tracked
from torchtune.errors import DataError
from torchtune.tokenizers.tokenizer import Tokenizer

LISTS = ("messages", "conversations", "conversation", "dialog")


@dataclass(frozen=True)
class Prompt:
    """What is asked.

    Attributes:
        asked: messages, or a text to go on with.
        tools: schemas that the template is given.
        expected: the answer that stands in the row, if there is one.
        source: where it stands.
    """

    asked: list[dict[str, Any]] | str
    tools: list[Any] | None = None
    expected: str | None = None
    source: str = ""


def prompt_of(row: Row, *, as_chat: bool, system: str | None = None) -> Prompt:
    """The prompt of a row of any format; an answer at its end is what is expected.

    Args:
        as_chat: strings become a user's message; otherwise a text to go on with.
        system: for chats that have no system message of their own.
    Raises:
        DataError: no prompt is in it; with file and line.
    """
    try:
        found = _read(row.record, as_chat, system)
    except DataError as error:
        raise DataError(error.problem, source=row.source) from error
    return Prompt(found.asked, found.tools, found.expected, row.source)


def chat_of(text: str, system: str | None = None) -> list[dict[str, Any]]:
    """A user's message, behind a system message if there is one."""
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": text}]


class Prompter:
    """Encodes prompts.

    Args:
        tokenizer: the checkpoint's.
        templates: by name, as `choose_template` gives them; None where there is no template.
        variables: for the template, besides the tokenizer's own tokens.
        now: the time that the template is told.
        special_tokens_in_content: what is done with special tokens' texts in messages.
    Raises:
        DataError: a template is not valid.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        templates: Mapping[str, str] | None,
        *,
        variables: Mapping[str, Any] | None = None,
        now: datetime | None = None,
        special_tokens_in_content: SpecialTokensInContent = "split",
    ) -> None:
        self.tokenizer = tokenizer
        self._encoder = Encoder(tokenizer, special_tokens_in_content)
        variables, now = {**tokenizer.special, **(variables or {})}, now or datetime.now()
        self._templates = {name: ChatTemplate(source, variables, now) for name, source in (templates or {}).items()}
        self._forms = {name: Forms(template) for name, template in self._templates.items()}

    @property
    def has_template(self) -> bool:
        """Whether messages can be asked."""
        return bool(self._templates)

    def encode(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt, with all that the template puts before an answer.

        Raises:
            DataError: messages without a template, or that it refuses.
        """
        try:
            if isinstance(prompt.asked, str):
                return self._encoder.prompt_ids(Tracked(prompt.asked), is_chat=False)
            return self._encoder.prompt_ids(self.render(prompt.asked, prompt.tools), is_chat=True)
        except DataError as error:
            raise DataError(error.problem, source=error.source or prompt.source) from error

    @property
    def source(self) -> str:
        """The default template's text."""
        return self._templates["default"].source if self._templates else ""

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: list[Any] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> Tracked:
        """The text of messages, up to where the model speaks.

        Raises:
            DataError: there is no template, or it refuses the messages.
        """
        if not self._templates:
            raise DataError(
                "the model has no chat template, so messages can't be asked; give texts, or a chat_template"
            )
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        forms, template = self._forms[name], self._templates[name]
        return template.render_tracked(forms.apply(messages), tools, add_generation_prompt=add_generation_prompt)


def _read(record: Any, as_chat: bool, system: str | None) -> Prompt:
    if isinstance(record, str):
        record = {"text": record}
    if not isinstance(record, dict) or not record:
        raise DataError("a row must be an object with columns, or a text")
    system = optional_text(record.get("system")) or system
    tools = read_tools(record.get("tools"))
    answer = next((record[name] for name in (*COMPLETIONS, "chosen") if isinstance(record.get(name), str)), None)
    for name in (*LISTS, "prompt"):
        listed = listed_messages(record.get(name))
        if isinstance(listed, list):
            return _of_messages(listed, tools, system, answer)
    for name in PROMPTS:
        goes_with_instruction = name == "input" and record.get("instruction") is not None
        if record.get(name) is not None and not goes_with_instruction:
            text, given = needed_text(record[name], name), ""
            if name == "instruction":
                given = optional_text(record.get("input"))
            if as_chat:
                return Prompt(chat_of(text + SEPARATOR + given if given else text, system), tools, answer)
            if name == "instruction":
                wording = ALPACA_PROMPT_WITH_INPUT if given else ALPACA_PROMPT
                text = wording.replace("{instruction}", text).replace("{input}", given)
            return Prompt(text, tools, answer)
    if record.get("text") is not None:
        return Prompt(needed_text(record["text"], "text"))
    raise DataError(
        f"no prompt: it has the columns {', '.join(map(str, record))}; expected is one of "
        f"{', '.join((*LISTS[:2], *PROMPTS, 'text'))}"
    )


def _of_messages(listed: list[Any], tools: list[Any] | None, system: str | None, answer: str | None) -> Prompt:
    messages, _ = read_messages(listed, {})
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    if messages[-1]["role"] == "assistant":
        answer = messages[-1]["content"]
        messages = messages[:-1]
    if not messages:
        raise DataError("its only message is the assistant's; there is nothing to answer")
    return Prompt(messages, tools, answer)
