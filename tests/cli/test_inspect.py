"""`tune inspect`: without weights, as numbers, coloured tokens, a page, and JSON lines."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.cli.test_tune import tune
from tests.tiny_checkpoint import save_tiny_checkpoint

ROWS = Path(__file__).parent.parent / "cases" / "common_rows24.jsonl"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Tokenizer and config, and no weights at all."""
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("inspect") / "tiny-llama")
    (folder / "model.safetensors").unlink()
    return folder


def json_lines(model, data, *more, cwd=None):
    done = tune("inspect", f"model_checkpoint={model}", f"dataset={data}", "--json", *more, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_json_says_what_is_trained(model):
    """Ids are those of apply_chat_template, targets the assistant's words and the end of turn, place by place."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line)["messages"] for line in ROWS.read_text().splitlines()]
    found = json_lines(model, ROWS)
    assert len(found) == len(rows)
    for index, (line, messages) in enumerate(zip(found, rows, strict=True)):
        assert line["row"] == index
        assert line["source"] == f"{ROWS}:{index + 1}"
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert line["text"] == text
        assert line["ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
        answers = [message["content"] + "<|im_end|>" for message in messages if message["role"] == "assistant"]
        assert line["trained_text"] == answers
        kept = [token for token, trained in zip(line["ids"], line["trained"], strict=True) if trained]
        assert tokenizer.decode(kept) == "".join(answers)


def test_the_terminal_shows_numbers_and_marks(model):
    """Statistics, then rows; brackets stand for colour where there is none."""
    done = tune("inspect", f"model_checkpoint={model}", f"dataset={ROWS}", "--rows", "2")
    assert done.returncode == 0, done.stderr
    first = json.loads(ROWS.read_text().splitlines()[0])["messages"]
    answer = next(message["content"] for message in first if message["role"] == "assistant")
    for said in ("24 rows", "duplicates", "packed into", "padded in batches", f"[[{answer}<|im_end|>]]"):
        assert said in done.stdout
    assert done.stdout.count("[[") == 2


def test_colours_are_forced_on_request(model):
    """As every tool of the field: FORCE_COLOR, and NO_COLOR against it."""
    keys = ("inspect", f"model_checkpoint={model}", f"dataset={ROWS}", "--rows", "1")
    assert "\x1b[" in tune(*keys, env={**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"}).stdout
    assert "\x1b[" not in tune(*keys).stdout


def test_duplicates_cut_rows_and_lengths_are_counted(model, tmp_path):
    """Numbers by hand: three copies are two duplicates; what max_seq_len cuts is listed by line."""
    row = json.dumps({"prompt": "a", "completion": "b"})
    long = json.dumps({"prompt": "a", "completion": "word " * 100})
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join([row, row, row, long]))
    done = tune("inspect", f"model_checkpoint={model}", f"dataset={data}", "max_seq_len=64")
    assert "2 of 3 samples are duplicates" in done.stdout
    assert f"{data}:4" in done.stdout
    assert "left out" in done.stdout


def test_a_bad_row_is_told_and_a_wrong_key_too(model, tmp_path):
    """As in a run."""
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    done = tune("inspect", f"model_checkpoint={model}", f"dataset={data}")
    assert done.returncode == 1
    assert "rows.jsonl:2" in done.stderr
    done = tune("inspect", f"model_checkpoint={model}", f"dataset={data}", "dataset.limt=1")
    assert done.returncode == 2
    assert "did you mean 'dataset.limit'" in done.stderr


def test_standard_input_is_inspected(model):
    """`cat rows.jsonl | tune inspect dataset=-`."""
    program = ["-m", "torchtune.cli.tune", "inspect", f"model_checkpoint={model}", "dataset=-", "--json"]
    done = subprocess.run(
        [sys.executable, *program], input=ROWS.read_bytes(), capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"\n") == 24


def write_page(model, folder, text):
    data = folder / "rows.jsonl"
    data.write_text(json.dumps({"prompt": text, "completion": f"answer {text}"}) + "\n", encoding="utf-8")
    target = folder / "page.html"
    done = tune("inspect", f"model_checkpoint={model}", f"dataset={data}", "--html", target)
    assert done.returncode == 0, done.stderr
    return target


def test_the_page_needs_nothing_else_and_escapes_what_rows_hold(model, tmp_path):
    """No address is loaded from it, and a row's markup stays text."""
    page = write_page(model, tmp_path, "<script>alert(1)</script> & ünï 🎉").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "src=" not in page
    assert "http" not in page
    assert page.count('class="trained"') > 3


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_page_in_a_browser(model, tmp_path):
    """Chromium lays it out, runs its script, and shows trained tokens with a colour of their own."""
    page = write_page(model, tmp_path, "what is <b>two</b>?")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    done = subprocess.run(
        [CHROMIUM, *flags, f"--user-data-dir={tmp_path}/profile", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "1 of 1 samples" in done.stdout, done.stderr
