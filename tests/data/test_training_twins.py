"""Our masks on stock templates against the generation marks of TRL's `_training` twins of the same templates.

TRL ships, for many families, the stock template and a twin of it in which `{% generation %}` marks what is
trained. On the stock one we find the mask without marks; every assistant turn must say the same, white space at
its end aside. Where it does not, REASONS says why ours is right, by a check and not by name alone.
"""

import importlib.util
import re
from datetime import datetime
from pathlib import Path

import pytest
from tiny_tokenizer import tiny_tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from torchtune.data.reading import Reading
from torchtune.data.recognise import Schema
from torchtune.data.renderer import Renderer
from torchtune.data.rows import Row
from torchtune.errors import DataError

_found = importlib.util.find_spec("trl")
FOLDER = Path(_found.submodule_search_locations[0]) / "chat_templates" if _found else Path("nowhere")
NAMES = sorted(p.stem for p in FOLDER.glob("*.jinja") if (FOLDER / f"{p.stem}_training.jinja").exists())
READING = Reading(Schema("messages", {"messages": "messages", "tools": "tools"}), {})
SPECIAL = re.compile(
    r"<\|[^|<>]{1,40}\|>|<｜[^｜]{1,40}｜>|<\|?turn\|?>|</?(?:start_of_turn|end_of_turn|bos|eos|s|end_of_utterance)>"
    r"|<(?:start_of_turn|end_of_turn|end_of_utterance)>|\[/?(?:INST|TOOL_CALLS|TOOL_RESULTS|AVAILABLE_TOOLS)\]"
)
# What the checkpoints' generation_config stops on.
STOPS = {
    "cohere": ["<|END_OF_TURN_TOKEN|>"],
    "cohere2": ["<|END_OF_TURN_TOKEN|>"],
    "glm4moe": ["<|user|>", "<|observation|>"],
    "gptoss": ["<|return|>", "<|call|>"],
    "phi3": ["<|end|>"],
    "phi3_5": ["<|end|>"],
}


# Templates that read content as a list of parts alone.
IN_PARTS = ("idefics3", "llava_next", "smolvlm")


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


PROPERTIES = {"a": {"type": "integer", "description": "one"}, "b": {"type": "integer", "description": "another"}}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": PROPERTIES, "required": ["a", "b"]},
    },
}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
CONVERSATIONS = {
    "one": ([user("One?"), assistant("First answer.")], None),
    "system": ([{"role": "system", "content": "Be brief."}, user("One?"), assistant("First answer.")], None),
    "two": ([user("One?"), assistant("First answer."), user("Two?"), assistant("Second\n\nanswer.")], None),
    "three": (
        [user("One?"), assistant("First."), user("Two?"), assistant(" Second "), user("Three?"), assistant("Third.")],
        None,
    ),
    "code": (
        [user("Code?"), assistant("```python\nprint('<b>')\n```\n"), user("More?"), assistant("{{ no }} 🎉")],
        None,
    ),
    "reasoning": (
        [
            user("One?"),
            assistant("First.", reasoning_content="Hm one."),
            user("Two?"),
            assistant("Second.", reasoning_content="Hm two."),
        ],
        None,
    ),
    "calling": (
        [
            user("Add."),
            assistant("", tool_calls=[CALL]),
            {"role": "tool", "name": "add", "content": "5"},
            assistant("It is 5."),
        ],
        [ADD],
    ),
}


def renderer_of(name):
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    special = set(SPECIAL.findall(source))
    stops = STOPS.get(name, [])
    known = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|eot|>", "<｜end▁of▁sentence｜>")
    known += ("<end_of_utterance>", "</s>")
    eos = next((token for token in (*stops, *known) if token in source), "<eos>")
    tokenizer = tiny_tokenizer(special=tuple(sorted(special - {eos})), bos="<bos>", eos=eos)
    return Renderer(tokenizer, source, reading=READING, stop_tokens=stops, now=datetime(2026, 1, 1))


def ours(renderer, messages, tools):
    """By assistant message: what inference feeds before it, and the text that is trained."""
    record = {"messages": messages} | ({"tools": tools} if tools else {})
    turns = {}
    for draft in renderer.drafts(Row(0, record, "chat:1")).drafts:
        for turn in draft.turns:
            turns[turn.message] = (str(draft.text[: turn.start]), str(draft.text[turn.start : turn.end]))
    return [turns[message] for message in sorted(turns)]


def marked(name, renderer, messages, tools):
    """The twin's marked regions, adjacent ones joined."""
    source = (FOLDER / f"{name}_training.jinja").read_text(encoding="utf-8")
    if name in IN_PARTS:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    texts, spans = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=source,
        return_assistant_tokens_mask=True,
        **renderer.tokenizer.special,
    )
    regions = []
    for start, end in spans[0]:
        if regions and regions[-1][1] == start:
            regions[-1][1] = end
        else:
            regions.append([start, end])
    return [texts[0][start:end] for start, end in regions if texts[0][start:end].strip()]


def difference(prompt, trained, twin):
    """Empty where both say the same; else what the twin has besides, or both."""
    trained, twin = trained.rstrip(), twin.rstrip()
    if trained == twin:
        return ""
    if twin.endswith(trained) and prompt.endswith(twin[: -len(trained)]):
        return "the twin also marks what inference feeds"
    return f"{trained!r} for {twin!r}"


def compare(name, conversation):
    messages, tools = CONVERSATIONS[conversation]
    renderer = renderer_of(name)
    try:
        found = ours(renderer, messages, tools)
    except DataError as error:
        return f"refused: {error.problem}"
    twins = marked(name, renderer, messages, tools)
    if len(found) != len(twins):
        return f"{[text for _, text in found]} for {twins}"
    return "; ".join(filter(None, (difference(*turn, twin) for turn, twin in zip(found, twins, strict=True))))


def stock(name, messages, tools=None, *, add_generation_prompt=False):
    """The stock template's text by transformers; None where the template refuses."""
    renderer = renderer_of(name)
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    try:
        texts, _ = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=source,
            add_generation_prompt=add_generation_prompt,
            **renderer.tokenizer.special,
        )
    except Exception:
        return None
    return texts[0]


def reads_as_at_inference(name, conversation):
    """Every trained text is what the stock template writes behind the prompt that inference feeds, up to that turn."""
    messages, tools = CONVERSATIONS[conversation]
    renamed = [{("thinking" if key == "reasoning_content" else key): v for key, v in m.items()} for m in messages]
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i, (_, trained) in zip(places, ours(renderer_of(name), messages, tools), strict=True):
        trained = trained.removesuffix("<|user|>") if name == "glm4moe" else trained  # not written by the template
        if not any(
            (whole := stock(name, form[: i + 1], tools)) is not None
            and whole.startswith((stock(name, form[:i], tools, add_generation_prompt=True) or "") + trained)
            for form in (messages, renamed)
        ):
            return False
    return True


def opens_otherwise(name, conversation):
    """What inference feeds is no beginning of what the template writes, for some turn."""
    messages, tools = CONVERSATIONS[conversation]
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return any(
        not (stock(name, messages[: i + 1], tools) or "").startswith(
            stock(name, messages[:i], tools, add_generation_prompt=True) or "no"
        )
        for i in places
    )


FEEDS = "the twin also marks what inference feeds"
# Template (a beginning of its name), conversations, what is seen, and the check that makes it right.
REASONS = [
    # The generation prompt is fed, not said: its <think>, header or line break is not ours to train.
    ("", None, rf"({FEEDS})(; {FEEDS})*", lambda name, conversation: True),
    # The template itself refuses such messages, or leaves out a tool's answer.
    ("", ("calling", "system"), "refused: the chat template (refuses|misses)", lambda n, c: stock(n, *CONVERSATIONS[c]) is None),
    ("phi3", ("calling",), "refused: the chat template leaves out the content of message 3", lambda n, c: "\n5<" not in stock(n, *CONVERSATIONS[c])),
    # Inference opens a thought that rows without one do not have.
    ("deepseek", None, "refused: the chat template opens the turn", opens_otherwise),
    ("nemotron_3", None, "refused: the chat template opens the turn", opens_otherwise),
    ("qwen3_5_nothink", ("reasoning",), "refused: the chat template opens the turn", opens_otherwise),
    # The twin writes earlier turns as a later prompt shows them; each of ours is trained as it is said.
    ("gptoss", ("two", "three", "code", "reasoning"), ".* for ", reads_as_at_inference),
    ("nemotron_3", ("reasoning",), ".* for ", reads_as_at_inference),
    ("glm4moe", ("reasoning",), ".* for ", reads_as_at_inference),
    ("diffusion_gemma", ("reasoning", "calling"), ".* for ", reads_as_at_inference),
    # The stock template writes no calls at all; ours are JSON, with a note.
    ("", ("calling",), r"'\{\"name\": \"add\"", lambda n, c: "add" not in stock(n, CONVERSATIONS[c][0])),
    # The twin marks the template's own eos_token at the very end, behind the turn.
    ("phi3", None, r".*<\|end\|>' for .*<\|end\|>\\n<\|end\|>'", lambda n, c: True),
]  # fmt: skip


@pytest.mark.skipif(not NAMES, reason="needs trl")
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_the_mask_is_the_twins(name, conversation):
    """The same text is trained, turn by turn, or the difference is one of REASONS and its check holds."""
    seen = compare(name, conversation)
    if not seen:
        return
    found = [
        check
        for beginning, conversations, pattern, check in REASONS
        if name.startswith(beginning)
        and (conversations is None or conversation in conversations)
        and re.match(pattern, seen, re.DOTALL)
    ]
    assert found, seen
    assert any(check(name, conversation) for check in found), seen
