"""tune chat, over pipes: answers as transformers gives them to the same conversation, and the commands."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_config


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("chat") / "tiny", tiny_config(max_position_embeddings=256))


def talk(folder, lines, *keys):
    command = [sys.executable, "-m", "torchtune.cli.tune", "chat", str(folder), "dtype=fp32", "max_new_tokens=6", *keys]
    text = "".join(f"{line}\n" for line in lines)
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, check=False)


def answer(folder, messages):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).generate(
        ids, max_new_tokens=6, do_sample=False
    )
    return tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_conversation_goes_on_and_is_kept_as_a_row(model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    lines = ["hello", "and then?", "forget this", "/undo", f"/save {rows}", "/system other", "hi", f"/save {rows}"]
    done = talk(model, [*lines, "/quit", "not read"], "system=short")
    assert done.returncode == 0, done.stderr
    messages = [{"role": "system", "content": "short"}]
    for text in ("hello", "and then?"):
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": answer(model, messages)})
    other = [{"role": "system", "content": "other"}, {"role": "user", "content": "hi"}]
    other.append({"role": "assistant", "content": answer(model, other)})
    assert [json.loads(line)["messages"] for line in rows.read_text().splitlines()] == [messages, other]
    assert done.stdout.startswith(messages[2]["content"] + "\n" + messages[4]["content"] + "\n")


def test_mistakes_are_told_and_the_conversation_goes_on(model):
    done = talk(model, ["/nothing", "word " * 400, "/history"])
    assert done.returncode == 0
    assert "there is no /nothing" in done.stderr
    assert "256 positions; /reset begins anew" in done.stderr
    assert "Traceback" not in done.stderr
