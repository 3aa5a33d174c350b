"""The template engine against transformers' own."""

import pickle
import time
from datetime import datetime

import pytest
from stock_templates import TOKENIZERS, TOOLS, assistant, calls, system, template, tokenizer_of, tool, user
from transformers.utils.chat_template_utils import render_jinja_template

from torchtune.data.template import ChatTemplate, TemplateRefused, choose_template
from torchtune.errors import DataError

NOW = datetime(2025, 1, 2)
CHATS = {
    "two turns": [user("One?"), assistant(" First. "), user("Zwei? 🙂\n"), assistant("Ünd\n\nnow.")],
    "system": [system("Be kind."), user("One?"), assistant("First.")],
    "tools": [user("Add."), assistant("", tool_calls=calls(("add", {"a": 2, "b": [1, {"c": "é"}]}))), tool("5")],
    "reasoning": [user("One?"), assistant("First.", reasoning_content="Hm."), user("Two?"), assistant("Second.")],
    "thought inline": [user("One?"), assistant("<think>\nHm.\n</think>\n\nFirst.")],
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("chat", CHATS)
def test_rendering_equals_transformers(name, chat):
    """Every stock template, plain and tracked, gives what apply_chat_template gives, or both refuse."""
    variables = tokenizer_of(name).special
    ours = ChatTemplate(template(name), variables, NOW)
    tools = TOOLS if chat == "tools" else None
    for add_generation_prompt in (False, True):
        try:
            (expected,), _ = render_jinja_template(
                [CHATS[chat]],
                tools=tools,
                chat_template=template(name),
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except Exception:
            with pytest.raises(DataError):
                ours.render(CHATS[chat], tools, add_generation_prompt=add_generation_prompt)
            continue
        given = {"add_generation_prompt": add_generation_prompt}
        assert ours.render(CHATS[chat], tools, **given) == expected
        assert ours.render_tracked(CHATS[chat], tools, **given) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content | upper ~ '!' }}",
        "{{ '%s: %s' | format(messages[0].role, messages[0].content) }}",
        "{{ '{}-{:>9}'.format(messages[0].content, 'x') }}",
        "{{ messages | map(attribute='content') | join(' / ') }}",
        "{{ ', '.join(messages | map(attribute='content') | list) }}",
        "{% macro say(m) %}[{{ m.content }}]{% endmacro %}{{ say(messages[0]) + say(messages[1]) }}",
        "{% set text %}{{ messages[0].content }}.{% endset %}{{ text | trim }}",
        "{% filter upper %}{{ messages[0].content }}{% endfilter %}",
        "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t + m.content %}{% endfor %}{{ ns.t }}",
        "{{ messages | tojson(indent=2) }}",
        "{{ messages[0].content.split(' ')[-1].strip().replace('a', 'b') }}",
        "{{ messages[0].content | indent(4, true) | replace('e', '') }}",
        "{{ messages[0].content | truncate(3) }}{{ messages[0].content | wordwrap(2) }}",
        "{{ messages[0].content | safe }}{{ messages[1].content | string | title | capitalize | list | join }}",
        "{% for m in messages %}{{ loop.index ~ m.content }}{% if loop.first %}{% continue %}{% endif %}{% endfor %}",
        "{{ messages[0]['content'][::-1] }}{{ messages[0].content[0] }}{{ messages[0].content * 2 }}",
        "{% generation %}{{ messages[1].content }}{% endgeneration %}",
        "{{ strftime_now('%d %b %Y')[:0] }}{{ dict(a=messages[0].content).a }}",
        "{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}",
        "{{ messages[0].content if 'no' in messages[0].content else messages[1].content | first }}",
    ],
)
def test_what_templates_do_keeps_text_and_origin(source):
    """Each construct renders as transformers has it, and the words are still known to be the messages'."""
    messages = [user("Hello there, e"), assistant("Answer à é")]
    (expected,), _ = render_jinja_template([messages], chat_template=source)
    ours = ChatTemplate(source, {}, NOW)
    text = ours.render_tracked(messages)
    assert ours.render(messages) == expected
    assert text == expected
    assert text.spans, "where the words come from was lost"


def test_a_refusal_holds_the_templates_own_words():
    refusing = ChatTemplate("{{ raise_exception('no system here') }}", {}, NOW)
    with pytest.raises(TemplateRefused, match="no system here") as caught:
        refusing.render([user("x")])
    assert caught.value.message == "no system here"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ 'a' * 9999999999 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ 'a' | center(9999999999) }}",
        "{{ 'a'.ljust(9999999999) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '{:9999999999}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=9999999999) }}",
        "{{ '%*d' % (9999999999, 1) }}",
        "{{ ('a\\n' * 99999) | indent(999999) }}",
        "{{ ('a' * 999999).replace('', 'b' * 999999) }}",
        "{{ ('a' * 999999) | replace('a', 'b' * 999999) }}",
        "{{ (['a' * 999999] * 99999) | join }}",
        "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_time_and_size_are_limited(source, monkeypatch):
    """A template can't hang the run or fill the memory."""
    monkeypatch.setattr("torchtune.data.sandbox.MAX_SECONDS", 0.5)
    started = time.monotonic()
    with pytest.raises(DataError):
        ChatTemplate(source, {}, NOW).render([user("x")])
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[0].content.__class__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ ''.format.__globals__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ namespace(__init__=1) }}",
    ],
)
def test_templates_cannot_reach_python(source):
    """Neither attributes of Python nor the row itself can be touched, with plain texts or tracked ones."""
    messages = [user("x")]
    for render in (ChatTemplate(source, {}, NOW).render, ChatTemplate(source, {}, NOW).render_tracked):
        try:
            text = render(messages)
        except DataError:
            text = ""
        assert "class" not in text
        assert "built" not in text
    assert messages == [user("x")]


def test_the_time_is_the_same_for_every_row():
    dated = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}, datetime(2024, 7, 26))
    assert dated.render([user("x")]) == "26 Jul 2024"
    assert pickle.loads(pickle.dumps(dated)).render([user("x")]) == "26 Jul 2024"


def test_broken_template_is_refused_with_its_line():
    with pytest.raises(DataError, match="its line 2"):
        ChatTemplate("ok\n{% if %}", {}, NOW)


class TestChooseTemplate:
    """Case C028: several named templates."""

    NAMED = {"default": "D", "tool_use": "T", "rag": "R"}  # noqa: RUF012

    def test_default_and_tool_use_are_taken(self):
        assert choose_template(None, self.NAMED) == {"default": "D", "tool_use": "T"}

    def test_one_is_the_default(self):
        assert choose_template(None, "{{ x }}") == {"default": "{{ x }}"}
        assert choose_template(None, None) is None

    def test_no_default_is_refused_with_the_names(self):
        with pytest.raises(DataError, match="none called 'default': rag"):
            choose_template(None, {"rag": "R"})

    def test_one_can_be_chosen_by_name(self):
        assert choose_template("rag", {"rag": "R"}) == {"default": "R"}

    def test_a_file_or_a_text_overrides(self, tmp_path):
        file = tmp_path / "mine.jinja"
        file.write_text("\ufeff{{ 'é' }}", encoding="utf-8")
        assert choose_template(str(file), "x") == {"default": "{{ 'é' }}"}
        assert choose_template("{% if a %}{% endif %}", "x") == {"default": "{% if a %}{% endif %}"}

    def test_an_unknown_name_is_refused_with_the_nearest(self):
        with pytest.raises(DataError, match="did you mean 'tool_use'"):
            choose_template("tool_uses", self.NAMED)
