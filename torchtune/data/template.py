"""A checkpoint's chat template: conversations to text, plain or tracked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template
from jinja2.exceptions import TemplateError, TemplateSyntaxError, UndefinedError

from torchtune.data.limits import TooMuch
from torchtune.data.sandbox import ChatEnvironment, TemplateRefusal, TrackedEnvironment
from torchtune.data.tracked import TOOLS, Tracked, mark_all
from torchtune.errors import DataError, did_you_mean

Message = dict[str, Any]


class ChatTemplate:
    """Renders conversations. Safe to use from several threads, and can be sent to processes.

    Args:
        source: the template's text.
        variables: what it is given besides the messages: `bos_token`, `eos_token`, `enable_thinking`, ...
        now: the time that it is told, the same for every row.
    Raises:
        DataError: the template is not valid Jinja.
    """

    def __init__(self, source: str, variables: Mapping[str, Any], now: datetime) -> None:
        self.source = source
        self.has_generation_marks = "endgeneration" in source
        self._variables = dict(variables)
        self._now = now
        self._compile()

    def render(
        self, messages: Sequence[Message], tools: list[Any] | None = None, *, add_generation_prompt: bool = False
    ) -> str:
        """The text, as inference gets it."""
        return self._render(self._plain, messages, tools, add_generation_prompt)

    def render_tracked(
        self, messages: Sequence[Message], tools: list[Any] | None = None, *, add_generation_prompt: bool = False
    ) -> Tracked:
        """The same text, with which characters came from which field of which message.

        Raises:
            DataError: tracking changed the text, so that where it came from can't be told.
        """
        marked = [{key: mark_all(value, (i, key)) for key, value in m.items()} for i, m in enumerate(messages)]
        text = self._render(self._tracked, marked, mark_all(tools, TOOLS), add_generation_prompt)
        if text != self.render(messages, tools, add_generation_prompt=add_generation_prompt):
            raise DataError(
                "the chat template does something to messages that can't be followed, so it can't be told whose words "
                "are whose; please report it with the template, and give dataset.chat_template another one"
            )
        assert isinstance(text, Tracked)
        return text

    def _render(
        self,
        compiled: tuple[ChatEnvironment, Template],
        messages: Sequence[Message],
        tools: list[Any] | None,
        add_generation_prompt: bool,
    ) -> str:
        environment, template = compiled
        variables = {
            **self._variables,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return environment.render(template, variables)
        except TemplateRefusal as error:
            raise TemplateRefused(error.message or "") from error
        except TooMuch as error:
            raise DataError(f"rendering by the chat template was stopped: {error.message}") from error
        except UndefinedError as error:
            raise DataError(f"the chat template misses something in this row: {error.message}") from error
        except TemplateError as error:
            raise DataError(f"the chat template can't be rendered: {error.message}") from error
        except RecursionError as error:
            raise DataError("the chat template calls itself without end on this row") from error
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError, MemoryError) as error:
            problem = f"the chat template can't render this row: {type(error).__name__}: {error}"
            raise DataError(problem) from error

    def _compile(self) -> None:
        try:
            plain, tracked = ChatEnvironment(self._now), TrackedEnvironment(self._now)
            self._plain = (plain, plain.from_string(self.source))
            self._tracked = (tracked, tracked.from_string(self.source))
        except TemplateSyntaxError as error:
            raise DataError(f"the chat template is not valid: {error.message} (its line {error.lineno})") from error
        except RecursionError as error:
            raise DataError("the chat template is not valid: it is nested too deeply") from error

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_plain", "_tracked")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._compile()


class TemplateRefused(DataError):
    """The template's own refusal of a row.

    Attributes:
        message: what the template said.
    """

    def __init__(self, message: str, *, remedy: str = "") -> None:
        self.message = message
        super().__init__(f"the chat template refuses this row: {message!r}" + (f"; {remedy}" if remedy else ""))


def choose_template(option: str | None, templates: str | Mapping[str, str] | None) -> dict[str, str] | None:
    """The templates of a run by name: `default`, and `tool_use` for rows with tools if there is one.

    Args:
        option: a .jinja file, a template's text, or the name of one of `templates`.
        templates: the checkpoint's template, or several by name.
    Returns:
        None if there is no template.
    Raises:
        DataError: no such file or name, or several templates and none of them the default.
    """
    named = {"default": templates} if isinstance(templates, str) else dict(templates or {})
    if option is None:
        if named and "default" not in named:
            names = ", ".join(named)
            raise DataError(
                f"the checkpoint has several chat templates and none called 'default': {names}; "
                f"choose one, e.g. dataset.chat_template={next(iter(named))}"
            )
        return {name: named[name] for name in ("default", "tool_use") if name in named} or None
    if option in named:
        return {"default": named[option]}
    if "{%" in option or "{{" in option:
        return {"default": option}
    if not Path(option).is_file():
        near = did_you_mean(option, named)
        raise DataError(f"dataset.chat_template: there is no file and no template of that name{near}", source=option)
    return {"default": Path(option).read_text(encoding="utf-8-sig")}
