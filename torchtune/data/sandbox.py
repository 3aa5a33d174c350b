"""Jinja for chat templates, which come with checkpoints and are not trusted.

The environment is the one that templates are written for (that of transformers' apply_chat_template), without
access to Python, and with limits on time and size. It comes twice: with plain texts, and with tracked ones
(tracked.py), where a few operations are replaced by those that keep the spans.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, ClassVar

import jinja2.ext
from jinja2 import Template, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from torchtune.data.limits import (
    MAX_CHARS,
    MAX_SECONDS,
    TooMuch,
    check_arguments,
    check_product,
    check_size,
    is_small,
)
from torchtune.data.tracked import GENERATION, Tracked, concat, covered, formatted, join, labels_in


class TemplateRefusal(TemplateError):
    """The template itself said no, by raise_exception; the message is its own."""


class _JoinsInEnvironment(CodeGenerator):
    """Compiles `~` to a call of the environment, which can keep spans and see sizes."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.join_all((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class GenerationMarks(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, by which some templates mark what is trained."""

    tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

    def marked(self, caller: Callable[[], str]) -> str:
        text = caller()
        if not isinstance(text, Tracked):
            return text
        return Tracked(text, ((0, len(text), GENERATION), *text.spans) if text else ())


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """For plain texts.

    Args:
        now: the time that strftime_now tells, the same for every row of a run.
    """

    code_generator_class = _JoinsInEnvironment
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, now: datetime) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationMarks, "jinja2.ext.loopcontrols"])
        self._clock = threading.local()
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=now.strftime,
            dict=_Dict(),
            namespace=_Namespace,
        )
        self.filters["tojson"] = _tojson
        for name, function in self._own_filters().items():
            self.filters[name] = function
        for name, function in list(self.filters.items()):
            self.filters[name] = self._guarded(function)

    def render(self, template: Template, variables: Mapping[str, Any]) -> str:
        """The rendering; raises TooMuch beyond the limits."""
        self._clock.end = time.monotonic() + MAX_SECONDS
        return template.render(variables)

    def _own_filters(self) -> dict[str, Callable[..., Any]]:
        return {}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Let every turn of every loop look at the clock."""
        parsed = super()._parse(source, name, filename)
        for loop in parsed.find_all(nodes.For):
            tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(tick).set_lineno(loop.lineno))
        return parsed

    def tick(self) -> None:
        """Raise TooMuch when the time is up."""
        if time.monotonic() > self._clock.end:
            raise TooMuch(f"it took more than {MAX_SECONDS:.0f} seconds")

    def concat(self, parts: Iterable[str]) -> str:
        """All that was printed, as one text."""
        return "".join(self._within_size(parts))

    def join_all(self, values: Iterable[Any]) -> str:
        """What `~` gives."""
        return self.concat(map(str, values))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":  # by far the most frequent
            result = left + right
            if isinstance(result, str):
                check_size(result)
            return result
        if operator == "**" and (not is_small(left) or not is_small(right)):
            raise TooMuch("a power is too large")
        if operator == "*":
            check_product(left, right)
        if operator == "%" and isinstance(left, str):
            check_arguments("format", left, right if isinstance(right, tuple) else (right,))
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, str):
            check_size(result)
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`format` and `format_map` of texts."""
        call = super().wrap_str_format(value)
        if call is None:
            return None
        unlimited = call

        def limited(*args: Any, **kwargs: Any) -> str:
            check_arguments("format", value.__self__, args, kwargs)
            return unlimited(*args, **kwargs)

        return limited

    def call(self, context: Context, callee: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Any call that a template makes."""
        owner = getattr(callee, "__self__", None)
        if isinstance(owner, str):
            check_arguments(callee.__name__, owner, args)
        result = super().call(context, callee, *args, **kwargs)
        if isinstance(result, str):
            check_size(result)
        return result

    def _within_size(self, parts: Iterable[str]) -> list[str]:
        kept, size = [], 0
        for part in parts:
            size += len(part)
            if size > MAX_CHARS:
                raise TooMuch(f"it printed more than {MAX_CHARS:,} characters")
            kept.append(part)
        return kept

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            texts = [value for value in args if isinstance(value, str)]
            check_arguments(function.__name__.removeprefix("do_"), texts[0] if texts else "", args, kwargs)
            return self._filtered(function(*args, **kwargs), args)

        return guarded

    def _filtered(self, result: Any, args: tuple[Any, ...]) -> Any:
        if isinstance(result, str):
            check_size(result)
        return result


class TrackedEnvironment(ChatEnvironment):
    """For tracked texts. What it renders is checked against the plain rendering, so a difference can't hide."""

    def concat(self, parts: Iterable[str]) -> Tracked:
        return concat(self._within_size(parts))

    def _own_filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "join": _join,
            "replace": lambda text, old, new, count=None: Tracked(str(text), _spans(text)).replace(
                str(old), str(new), -1 if count is None else count
            ),
            "format": lambda text, *args, **kwargs: formatted(lambda v: plain_format(text, v), text, kwargs or args),
            # Markup is a str of its own kind; without autoescape it changes nothing but to escape what is added.
            "safe": lambda value: value if isinstance(value, str) else str(value),
        }

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        call = super().wrap_str_format(value)
        if call is None:
            return None
        wrapped = call

        def tracked(*args: Any, **kwargs: Any) -> str:
            return formatted(lambda given: wrapped(*given[0], **given[1]), value.__self__, (list(args), kwargs))

        return tracked

    def call(self, context: Context, callee: Any, /, *args: Any, **kwargs: Any) -> Any:
        # ", ".join(texts) is a method of a plain str, which would give a plain one.
        owner = getattr(callee, "__self__", None)
        if type(owner) is str and labels_in(args) and hasattr(Tracked, callee.__name__):
            callee = getattr(Tracked(owner), callee.__name__)
        return super().call(context, callee, *args, **kwargs)

    def _filtered(self, result: Any, args: tuple[Any, ...]) -> Any:
        result = super()._filtered(result, args)
        if isinstance(result, str) and not isinstance(result, Tracked) and labels_in(args):
            return covered(str(result), args)
        return result


class _Dict:
    """`dict(...)` for templates, without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace(...)` for templates, without names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a chat template can't set the attribute {name!r}")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> None:
    raise TemplateRefusal(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _join(values: Iterable[Any], separator: str = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        values = [
            value[attribute] if isinstance(value, Mapping) else getattr(value, str(attribute)) for value in values
        ]
    return join(str(separator), [str(value) for value in values])


def plain_format(text: str, values: Any) -> str:
    """`text % values`, as the filter `format` has it."""
    return str.__mod__(text, values)


def _spans(text: Any) -> tuple[Any, ...]:
    return text.spans if isinstance(text, Tracked) else ()
