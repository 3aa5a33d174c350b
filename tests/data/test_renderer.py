"""What is trained, written out by hand for stock templates, and proven against what inference feeds."""

import json
import pickle
import random
from datetime import datetime
from pathlib import Path

import pytest
from stock_templates import (
    MESSAGES,
    TOKENIZERS,
    TOOLS,
    assistant,
    calls,
    chat_row,
    render_samples,
    stock_renderer,
    system,
    template,
    tokenizer_of,
    tool,
    user,
)
from tiny_tokenizer import full_text, tiny_tokenizer, trained_texts
from transformers.utils.chat_template_utils import render_jinja_template

from torchtune.data.reading import Reading
from torchtune.data.recognise import Schema
from torchtune.data.renderer import Renderer
from torchtune.data.rows import open_rows
from torchtune.errors import DataError

CASES = Path(__file__).parent.parent / "cases"
CHATML = tiny_tokenizer(eos="<|im_end|>")
C030 = (CASES / "C030.jinja").read_text()

TWO_TURNS = [user("One?"), assistant("First answer."), user("Two?"), assistant("Second answer.")]
CALLING = [
    user("Add 2 and 3."),
    assistant(None, tool_calls=calls(("add", {"a": 2, "b": 3}))),
    tool("5"),
    assistant("It is 5."),
]
REASONING = [
    user("One?"),
    assistant("First.", reasoning_content="Hm one."),
    user("Two?"),
    assistant("Second.", reasoning_content="Hm two."),
]
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"

# By template: the samples of each conversation, as the texts of their trained regions.
EXPECTED = {
    "smollm2": {
        "two turns": [["First answer.<|im_end|>", "Second answer.<|im_end|>"]],
        "empty": [["<|im_end|>"]],
        "calling": [['{"name": "add", "arguments": {"a": 2, "b": 3}}<|im_end|>', "It is 5.<|im_end|>"]],
    },
    "qwen2.5": {
        "two turns": [["First answer.<|im_end|>", "Second answer.<|im_end|>"]],
        "empty": [["<|im_end|>"]],
        "calling": [
            [
                '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call><|im_end|>',
                "It is 5.<|im_end|>",
            ]
        ],
    },
    "qwen3": {
        "two turns": [
            [EMPTY_THOUGHT + "First answer.<|im_end|>"],
            [EMPTY_THOUGHT + "Second answer.<|im_end|>"],
        ],
        "empty": [[EMPTY_THOUGHT + "<|im_end|>"]],
        "calling": [
            [EMPTY_THOUGHT + '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call><|im_end|>'],
            [EMPTY_THOUGHT + "It is 5.<|im_end|>"],
        ],
        "reasoning": [
            ["<think>\nHm one.\n</think>\n\nFirst.<|im_end|>"],
            ["<think>\nHm two.\n</think>\n\nSecond.<|im_end|>"],
        ],
    },
    "llama3.1": {
        "two turns": [["First answer.<|eot_id|>", "Second answer.<|eot_id|>"]],
        "empty": [["<|eot_id|>"]],
        "calling": [['{"name": "add", "parameters": {"a": 2, "b": 3}}<|eot_id|>', "It is 5.<|eot_id|>"]],
    },
    "mistral-nemo": {
        "two turns": [["First answer.</s>", "Second answer.</s>"]],
        "empty": [["</s>"]],
        "calling": [
            [
                '[TOOL_CALLS][{"name": "add", "arguments": {"a": 2, "b": 3}, "id": "callnum00"}]</s>',
                "It is 5.</s>",
            ]
        ],
    },
    "mistral-v0.2": {"two turns": [["First answer.</s>", "Second answer.</s>"]], "empty": [["</s>"]]},
    "llama2": {"two turns": [[" First answer. </s>", " Second answer. </s>"]], "empty": [["  </s>"]]},
    "gemma2": {
        "two turns": [["First answer.<end_of_turn>", "Second answer.<end_of_turn>"]],
        "empty": [["<end_of_turn>"]],
    },
    "phi3": {"two turns": [["First answer.<|end|>", "Second answer.<|end|>"]], "empty": [["<|end|>"]]},
    "zephyr": {"two turns": [["First answer.</s>", "Second answer.</s>"]], "empty": [["</s>"]]},
}
CONVERSATIONS = {
    "two turns": TWO_TURNS,
    "empty": [user("One?"), assistant("")],
    "calling": CALLING,
    "reasoning": REASONING,
}


@pytest.mark.parametrize(
    ("name", "conversation"), [(name, each) for name, expected in EXPECTED.items() for each in expected]
)
def test_trained_text_is_the_models_words_and_their_end(name, conversation):
    """Content, reasoning and calls as the template writes them, and the end of turn; nothing else."""
    tools = TOOLS if conversation == "calling" else None
    samples = render_samples(stock_renderer(name), CONVERSATIONS[conversation], tools)
    trained = [trained_texts(tokenizer_of(name), sample) for sample in samples]
    assert trained == EXPECTED[name][conversation]


def fed_at_inference(name, messages, tools):
    """The ids that transformers feeds, and None where the template refuses."""
    try:
        (text,), _ = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=template(name),
            add_generation_prompt=True,
            **tokenizer_of(name).special,
        )
    except Exception:
        return None
    return tokenizer_of(name).encode(text).ids


def random_chat(rng, *, reasoning):
    """A few turns with contents that begin and end in white space, in words, in neither."""
    contents = ["Yes.", "", " a b", "\n\nx", "two\nlines\n", "  ", "{}", "é🙂", "a" * 30, "\ttab", "</think>", "\n"]
    messages = [system(rng.choice(["Be kind.", " S\n"]))] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, 4)):
        messages.append(user(rng.choice(contents) + "?"))
        extra = {"reasoning_content": rng.choice(["Hm.", "\nHm\n"])} if reasoning and rng.random() < 0.5 else {}
        messages.append(assistant(rng.choice(contents), **extra))
    return messages


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompt_is_what_inference_feeds_token_for_token(name):
    """Each trained region follows exactly the ids that transformers would feed before it, for any white space."""
    rng = random.Random(name)
    compared = 0
    for _ in range(150):
        messages = random_chat(rng, reasoning=name == "qwen3")
        try:
            samples = render_samples(stock_renderer(name), messages)
        except DataError:
            continue
        prompts = [
            fed_at_inference(name, messages[:i], None)
            for i, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        begins = []
        for sample in samples:
            ids, trained = sample.input_ids.tolist(), sample.trained.tolist()
            begins += [ids[:i] for i in range(1, len(ids)) if trained[i] and not trained[i - 1]]
        assert sorted(begins, key=len) == sorted(prompts, key=len)
        compared += len(prompts)
    assert compared > 100


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_whole_text_is_the_templates(name):
    """A conversation that stays whole reads as apply_chat_template writes it, its ids too: one BOS, no added EOS."""
    samples = render_samples(stock_renderer(name), TWO_TURNS[:2])
    (expected,), _ = render_jinja_template([TWO_TURNS[:2]], chat_template=template(name), **tokenizer_of(name).special)
    assert samples[0].input_ids.tolist() == tokenizer_of(name).encode(expected).ids
    assert samples[0].input_ids.dtype == "int32"
    if bos := tokenizer_of(name).bos_id:
        assert samples[0].input_ids.tolist().count(bos) == (0 if name in ("phi3", "zephyr") else 1)


def test_a_system_message_that_only_inference_shows_is_in_the_prompt():
    """Nemo's template puts the system message before the last user message, but only when nothing follows it."""
    samples = render_samples(stock_renderer("mistral-nemo"), [system("Be kind."), *TWO_TURNS])
    assert [full_text(tokenizer_of("mistral-nemo"), sample) for sample in samples] == [
        "<s>[INST]Be kind.\n\nOne?[/INST]First answer.</s>",
        "<s>[INST]One?[/INST]First answer.</s>[INST]Be kind.\n\nTwo?[/INST]Second answer.</s>",
    ]


def test_thinking_switched_off_is_the_prompts():
    """With enable_thinking=false inference feeds the empty thought, so it is not trained."""
    renderer = Renderer(
        tokenizer_of("qwen3"), template("qwen3"), reading=MESSAGES, template_variables={"enable_thinking": False}
    )
    samples = render_samples(renderer, TWO_TURNS)
    assert [trained_texts(renderer.tokenizer, sample) for sample in samples] == [
        ["First answer.<|im_end|>"],
        ["Second answer.<|im_end|>"],
    ]


def test_builtin_tools_end_in_their_own_token():
    """Llama 3.1 ends a call to the interpreter by <|eom_id|>, not by the end of turn."""
    renderer = Renderer(
        tokenizer_of("llama3.1"),
        template("llama3.1"),
        reading=MESSAGES,
        template_variables={"builtin_tools": ["search"]},
    )
    messages = [user("Find x."), assistant("", tool_calls=calls(("search", {"query": "x"}))), tool("y"), assistant("y")]
    (sample,) = render_samples(renderer, messages)
    trained = trained_texts(renderer.tokenizer, sample)
    assert trained == ['<|python_tag|>search.call(query="x")<|eom_id|>', "y<|eot_id|>"]


def test_case_c030_without_marks_the_mask_is_each_answer_and_its_end():
    rows = open_rows(CASES / "C030.jsonl")
    renderer = Renderer(CHATML, C030, reading=MESSAGES)
    trained = [trained_texts(CHATML, sample) for row in rows for sample in renderer.samples(row)]
    assert trained == [["Blue.<|im_end|>", "It is calm.<|im_end|>"], ["Yes.<|im_end|>"]]


def test_case_c039_every_turn_or_the_last():
    """All three turns by default; the last one only by name."""
    (row,) = open_rows(CASES / "C039.jsonl")
    (sample,) = Renderer(CHATML, C030, reading=MESSAGES).samples(row)
    turns = ["First answer.<|im_end|>", "Second answer.<|im_end|>", "Third answer.<|im_end|>"]
    assert trained_texts(CHATML, sample) == turns
    assert sample.num_trained == sum(len(CHATML.encode(turn).ids) for turn in turns)
    (sample,) = Renderer(CHATML, C030, reading=MESSAGES, train_on="last_assistant").samples(row)
    assert trained_texts(CHATML, sample) == turns[-1:]


def test_all_trains_every_token_that_something_precedes():
    (sample,) = render_samples(Renderer(CHATML, C030, reading=MESSAGES, train_on="all"), TWO_TURNS)
    assert sample.trained.tolist() == [False] + [True] * (len(sample) - 1)


def test_case_c020_calls_are_trained_and_answers_of_tools_are_not():
    rows = open_rows(CASES / "C020.jsonl")
    reading = Reading(Schema("messages", {"messages": "messages", "tools": "tools"}), {})
    renderer = Renderer(tokenizer_of("qwen2.5"), template("qwen2.5"), reading=reading)
    first, second = (renderer.samples(row)[0] for row in rows)
    call = '<tool_call>\n{"name": "add", "arguments": {"a": %d, "b": %d}}\n</tool_call>'
    assert trained_texts(renderer.tokenizer, first) == [
        f"{call % (2, 3)}\n{call % (4, 5)}<|im_end|>",
        "They are 5 and 9.<|im_end|>",
    ]
    assert trained_texts(renderer.tokenizer, second) == ["Hi.<|im_end|>"]
    for sample in (first, second):
        assert "Adds two numbers." in full_text(renderer.tokenizer, sample)
        assert "None" not in full_text(renderer.tokenizer, sample)


def test_arguments_as_json_text_are_arguments():
    """An object and its JSON text give the same ids."""
    as_text = json.loads(json.dumps(CALLING))
    as_text[1]["tool_calls"][0]["function"]["arguments"] = '{"a": 2, "b": 3}'
    ours, theirs = (render_samples(stock_renderer("qwen2.5"), each, TOOLS)[0] for each in (CALLING, as_text))
    assert ours.input_ids.tolist() == theirs.input_ids.tolist()


def test_a_template_that_wants_arguments_as_text_gets_text():
    """Some templates add arguments to a text; an object would fail there."""
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + c.function.arguments }}{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (sample,) = render_samples(Renderer(CHATML, source, reading=MESSAGES), CALLING)
    assert trained_texts(CHATML, sample)[0] == '<call>add{"a": 2, "b": 3}<|im_end|>'


def test_case_c028_rows_with_tools_use_the_tool_template():
    config = json.loads((CASES / "C028_tokenizer_config.json").read_text())
    named = {each["name"]: each["template"] for each in config["chat_template"]}
    renderer = Renderer(CHATML, named, reading=MESSAGES)
    with_tools = full_text(CHATML, render_samples(renderer, TWO_TURNS, TOOLS)[0])
    assert with_tools.startswith("<tool>add</tool>\n")
    assert not full_text(CHATML, render_samples(renderer, TWO_TURNS)[0]).startswith("<tool>")


MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "MARK{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("end", "note"),
    [
        ("<|im_end|>{% endgeneration %}", None),
        ("{% endgeneration %}<|im_end|>", "leave out the end of turn '<|im_end|>'"),
        ("<|im_end|> and more{% endgeneration %}", "end elsewhere"),
    ],
)
def test_generation_marks_are_compared(end, note):
    """The mask is the same whatever the marks say; what they say otherwise is told."""
    renderer = Renderer(CHATML, MARKED.replace("MARK", end), reading=MESSAGES)
    (rendered,) = renderer.render([chat_row(TWO_TURNS)])
    trained = trained_texts(CHATML, rendered.samples[0])
    assert trained == ["First answer.<|im_end|>", "Second answer.<|im_end|>"]
    assert (not rendered.notes) if note is None else any(note in each for each in rendered.notes)


def test_another_messages_words_in_a_turn_are_refused():
    """A template that writes the question into the answer is no mask to train on."""
    echo = C030.replace("m['content']", "m['content'] + (messages[0]['content'] if m['role'] == 'assistant' else '')")
    with pytest.raises(DataError, match="content of message 1 into the turn of message 4"):
        render_samples(Renderer(CHATML, echo, reading=MESSAGES), TWO_TURNS)


def test_a_turn_that_opens_otherwise_at_inference_is_refused():
    """R1-like: the generation prompt opens a thought that the rendered turn does not have."""
    thinking = C030.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'")
    with pytest.raises(DataError, match="opens the turn of message 4 at inference with '<think>") as caught:
        render_samples(Renderer(CHATML, thinking, reading=MESSAGES), TWO_TURNS)
    assert "chat_template_kwargs" in caught.value.problem


def test_a_template_without_an_end_of_turn_is_refused():
    bare = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    with pytest.raises(DataError, match="never learn to stop"):
        render_samples(Renderer(CHATML, bare, reading=MESSAGES), TWO_TURNS)


def test_content_that_the_template_drops_is_refused():
    silent = C030.replace("for m in messages", "for m in messages if m['role'] != 'system'")
    with pytest.raises(DataError, match=r"leaves out the content of message 1 \(system\)"):
        render_samples(Renderer(CHATML, silent, reading=MESSAGES), [system("S"), *TWO_TURNS])


def test_a_template_without_generation_prompt_does_not_train_its_header():
    """Inference has to write the header; the words begin behind it."""
    plain = "{% for m in messages %}{{ m.role.upper() }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    (sample,) = render_samples(Renderer(CHATML, plain, reading=MESSAGES), TWO_TURNS)
    assert trained_texts(CHATML, sample) == [" First answer.<|im_end|>", " Second answer.<|im_end|>"]


def test_an_end_of_turn_that_is_no_token_is_trained():
    """C024's turns end in plain text."""
    renderer = Renderer(CHATML, (CASES / "C024.jinja").read_text(), reading=MESSAGES)
    (sample,) = render_samples(renderer, TWO_TURNS)
    # The line's end is part of the last token, `>` and the newline being one.
    assert [text.rstrip("\n") for text in trained_texts(CHATML, sample)] == [
        "First answer.</turn>",
        "Second answer.</turn>",
    ]


def test_messages_without_a_template_are_refused_with_the_way_out():
    with pytest.raises(DataError, match=r"dataset\.chat_template=FILE") as caught:
        render_samples(Renderer(CHATML, None, reading=MESSAGES), TWO_TURNS)
    assert caught.value.source == "chats.jsonl:1"


def test_the_renderer_can_be_sent_to_a_process():
    renderer = Renderer(tokenizer_of("qwen3"), template("qwen3"), reading=MESSAGES, now=datetime(2025, 1, 1))
    copy = pickle.loads(pickle.dumps(renderer))
    ours, theirs = render_samples(renderer, REASONING), render_samples(copy, REASONING)
    assert [s.input_ids.tolist() for s in ours] == [s.input_ids.tolist() for s in theirs]
    assert [s.trained.tolist() for s in ours] == [s.trained.tolist() for s in theirs]
