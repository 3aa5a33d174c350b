"""Chat templates as published with their checkpoints, and the tokens that these define."""

from functools import cache
from pathlib import Path
from typing import Any

from tiny_tokenizer import tiny_tokenizer

from torchtune.data.reading import Reading
from torchtune.data.recognise import Schema
from torchtune.data.renderer import Renderer
from torchtune.data.rows import Row
from torchtune.data.sample import Sample
from torchtune.tokenizers.tokenizer import Tokenizer

FOLDER = Path(__file__).parent / "templates"
CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
NEMO = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]")
CALL_TAGS = ("<tool_call>", "</tool_call>")

TOKENIZERS: dict[str, dict[str, Any]] = {
    "smollm2": {"special": CHATML, "eos": "<|im_end|>"},
    "qwen2.5": {"special": CHATML, "eos": "<|im_end|>", "added": CALL_TAGS},
    "qwen3": {"special": CHATML, "eos": "<|im_end|>", "added": (*CALL_TAGS, "<think>", "</think>")},
    "llama3.1": {"special": LLAMA3, "bos": "<|begin_of_text|>", "eos": "<|eot_id|>", "adds_bos": True},
    "mistral-nemo": {"special": (*NEMO, "[/AVAILABLE_TOOLS]"), "bos": "<s>", "eos": "</s>", "adds_bos": True},
    "mistral-v0.2": {"special": (), "bos": "<s>", "eos": "</s>", "adds_bos": True},
    "llama2": {"special": (), "bos": "<s>", "eos": "</s>", "adds_bos": True},
    "gemma2": {"special": ("<start_of_turn>", "<end_of_turn>"), "bos": "<bos>", "eos": "<eos>", "adds_bos": True},
    "phi3": {
        "special": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "bos": "<s>",
        "eos": "<|endoftext|>",
        "rstrip": True,
    },
    "zephyr": {"special": (), "bos": "<s>", "eos": "</s>", "adds_bos": True},
}
MESSAGES = Reading(Schema("messages", {"messages": "messages"}), {})


def template(name: str) -> str:
    """The template's text."""
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer_of(name: str) -> Tokenizer:
    """A tiny tokenizer with the special tokens of that checkpoint."""
    return tiny_tokenizer(**TOKENIZERS[name])


@cache
def stock_renderer(name: str) -> Renderer:
    """The renderer of a checkpoint, with every default."""
    return Renderer(tokenizer_of(name), template(name), reading=MESSAGES)


def chat_row(messages: list[dict[str, Any]], tools: list[Any] | None = None) -> Row:
    """A row of messages."""
    record: dict[str, Any] = {"messages": messages}
    if tools:
        record["tools"] = tools
    return Row(0, record, "chats.jsonl:1")


def render_samples(renderer: Renderer, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> list[Sample]:
    """The samples of one conversation."""
    return renderer.samples(chat_row(messages, tools))


def user(content: Any) -> dict[str, Any]:
    """A user's message."""
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    """An assistant's message."""
    return {"role": "assistant", "content": content, **more}


def system(content: Any) -> dict[str, Any]:
    """A system message."""
    return {"role": "system", "content": content}


def calls(*functions: tuple[str, Any]) -> list[dict[str, Any]]:
    """Tool calls of (name, arguments)."""
    return [
        {"id": f"callnum0{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(functions)
    ]


def tool(content: str, number: int = 0) -> dict[str, Any]:
    """A tool's answer."""
    return {"role": "tool", "content": content, "tool_call_id": f"callnum0{number}"}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
        },
    }
]
