"""The same conversations in each supported form give the same ids and the same mask; mixes and transforms."""

import csv
import json
import pickle

import numpy as np
import pytest
from tiny_tokenizer import tiny_tokenizer, trained_texts

from torchtune.data.dataset import open_dataset
from torchtune.data.mix import Mix, Share
from torchtune.data.options import DatasetOptions
from torchtune.errors import ConfigError, DataError

TOKENIZER = tiny_tokenizer(eos="<|im_end|>")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PAIRS = [("What is two?", "It is one\nand one."), ('"Quoted", with commas', " spaces "), ("ünï 🎉", "yes")]
SINGLE_TURN = {
    "messages": lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
    "parts": lambda q, a: {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": q}]},
            {"role": "assistant", "content": [{"type": "text", "text": a}]},
        ]
    },
    "conversations": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    "conversation": lambda q, a: {"conversation": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
    "prompt": lambda q, a: {"prompt": q, "completion": a},
    "prompt as messages": lambda q, a: {
        "prompt": [{"role": "user", "content": q}],
        "completion": [{"role": "assistant", "content": a}],
    },
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
    "dolly": lambda q, a: {"instruction": q, "context": "", "response": a, "category": "qa"},
    "question": lambda q, a: {"question": q, "answer": a},
    "query": lambda q, a: {"query": q, "response": a},
    "input": lambda q, a: {"input": q, "output": a},
    "preference": lambda q, a: {"prompt": q, "chosen": a, "rejected": "no"},
    "preference as messages": lambda q, a: {
        "chosen": [{"role": "user", "content": q}, {"role": "assistant", "content": a}],
        "rejected": [{"role": "user", "content": q}, {"role": "assistant", "content": "no"}],
    },
    "preference, prompt as messages": lambda q, a: {
        "prompt": [{"role": "user", "content": q}],
        "chosen": [{"role": "assistant", "content": a}],
        "rejected": [{"role": "assistant", "content": "no"}],
    },
    "null columns": lambda q, a: {
        "messages": [{"role": "user", "content": q, "tool_calls": None}, {"role": "assistant", "content": a, "name": None}],
        "prompt": None,
        "tools": None,
    },
}  # fmt: skip


def samples(path, transform=None, **options):
    data = open_dataset(DatasetOptions(path=str(path), **options), TOKENIZER, CHATML, transform=transform)
    prepared = data.prepare(max_seq_len=None)
    return [
        (s.input_ids.tolist(), s.trained.tolist()) for row in range(prepared.num_rows) for s in prepared.samples_of(row)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def expected(tmp_path):
    return samples(write(tmp_path / "expected.jsonl", [SINGLE_TURN["messages"](*pair) for pair in PAIRS]))


@pytest.mark.parametrize("form", SINGLE_TURN)
def test_every_form_gives_the_same_ids_and_mask(tmp_path, expected, form):
    """Recognised by itself, without a key."""
    rows = [SINGLE_TURN[form](*pair) for pair in PAIRS]
    assert samples(write(tmp_path / "rows.jsonl", rows)) == expected


@pytest.mark.parametrize("form", ["prompt", "question", "alpaca"])
def test_from_a_table_too(tmp_path, expected, form):
    """CSV and Parquet of the same columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [SINGLE_TURN[form](*pair) for pair in PAIRS]
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert samples(tmp_path / "rows.csv") == expected
    assert samples(tmp_path / "rows.parquet") == expected


def test_messages_as_json_text_in_a_csv(tmp_path, expected):
    """A column of JSON text is what it holds."""
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["messages"])
        writer.writerows([json.dumps(SINGLE_TURN["messages"](*pair)["messages"])] for pair in PAIRS)
    assert samples(tmp_path / "rows.csv") == expected


def test_columns_of_any_name(tmp_path, expected):
    """A map from our names to the file's."""
    rows = [{"frage": q, "antwort": a} for q, a in PAIRS]
    found = samples(write(tmp_path / "rows.jsonl", rows), columns={"prompt": "frage", "completion": "antwort"})
    assert found == expected


def test_a_transcript_is_a_conversation(tmp_path):
    """HH-RLHF's texts, turn by turn."""
    chosen = "\n\nHuman: One?\n\nAssistant: First.\n\nHuman: Two?\n\nAssistant: Second."
    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "First."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "Second."},
    ]
    row = {"chosen": chosen, "rejected": chosen + " Not."}
    whole = samples(write(tmp_path / "messages.jsonl", [{"messages": messages}]))
    assert samples(write(tmp_path / "rows.jsonl", [row])) == whole
    with pytest.raises(DataError, match="without a prompt"):
        samples(write(tmp_path / "bare.jsonl", [{"chosen": "yes", "rejected": "no"}]))


def swapped(record, left_out=None):
    """A transform of a user."""
    if record["q"] == left_out:
        return None
    return {"prompt": record["q"], "completion": record["a"]}


def test_a_transform_comes_before_recognition(tmp_path, expected):
    """None leaves a row out, counted; a failure names the row."""
    from functools import partial

    path = write(tmp_path / "rows.jsonl", [{"q": q, "a": a} for q, a in PAIRS])
    assert samples(path, transform=swapped) == expected
    assert samples(path, transform=partial(swapped, left_out=PAIRS[0][0])) == expected[1:]
    with pytest.raises(DataError, match=r"rows\.jsonl:1: dataset\.transform failed on this row: KeyError"):
        samples(path, transform=lambda record: record["nothing"])
    data = open_dataset(
        DatasetOptions(path=str(path)), TOKENIZER, CHATML, transform=partial(swapped, left_out="ünï 🎉")
    )
    assert "1 row left out by dataset.transform" in str(data.prepare(max_seq_len=None).report)
    assert pickle.loads(pickle.dumps(data.rows))[0].record == {"prompt": PAIRS[0][0], "completion": PAIRS[0][1]}


def test_a_row_of_another_form_is_refused_or_skipped(tmp_path, expected):
    """With file, line and what was expected."""
    rows = [SINGLE_TURN["prompt"](*PAIRS[0]), {"text": "another"}, SINGLE_TURN["prompt"](*PAIRS[1])]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the row has no prompt and no completion, but text"):
        samples(path)
    assert samples(path, on_bad_row="skip") == expected[:2]


def prepared(tmp_path, name, num_rows, words):
    rows = [{"prompt": f"{name} {i}", "completion": "word " * words} for i in range(num_rows)]
    path = write(tmp_path / f"{name}.jsonl", rows)
    return open_dataset(DatasetOptions(path=str(path)), TOKENIZER, CHATML).prepare(max_seq_len=None)


def test_a_mix_gives_tokens_by_weight(tmp_path):
    """Over an epoch each part's tokens are its weight's share, and in the long run every row comes equally often."""
    small, large = prepared(tmp_path, "small", 10, 2), prepared(tmp_path, "large", 200, 10)
    mix = Mix([small, large], [Share(weight=1), Share(weight=3)])
    sampler = mix.sampler(seed=0, shuffle=True)
    counts = np.zeros(mix.num_rows, int)
    for epoch in range(40):
        order = sampler.order(epoch)
        tokens = [
            sum(len(s) for row in order for s in mix.samples_of(row) if (row < 10) == is_small) for is_small in (1, 0)
        ]
        assert tokens[0] / sum(tokens) == pytest.approx(0.25, abs=0.01)
        np.add.at(counts, order, 1)
    assert counts[:10].max() - counts[:10].min() <= 1
    assert counts[10:].max() - counts[10:].min() <= 1
    assert "25%" in str(mix.report)


def test_a_mix_gives_tokens_by_budget_and_whole_parts_without(tmp_path):
    """A budget is met within a row; a part without anything comes once an epoch."""
    small, large = prepared(tmp_path, "small", 10, 2), prepared(tmp_path, "large", 200, 10)
    mix = Mix([small, large], [Share(), Share(tokens=1000)])
    order = mix.sampler(seed=0, shuffle=True).order(0)
    assert sorted(row for row in order if row < 10) == list(range(10))
    tokens = [len(s) for row in order if row >= 10 for s in mix.samples_of(row)]
    assert abs(sum(tokens) - 1000) <= max(tokens)
    assert (order != mix.sampler(seed=0, shuffle=True).order(1)).any()
    with pytest.raises(ConfigError, match="neither weight nor tokens"):
        Mix([small, large], [Share(weight=1), Share()])


def test_each_part_of_a_mix_keeps_its_own_keys(tmp_path):
    """One trains all, one the assistant alone."""
    path = write(tmp_path / "rows.jsonl", [SINGLE_TURN["prompt"](*pair) for pair in PAIRS])
    options = DatasetOptions(mix=[{"path": str(path), "train_on": "all"}, {"path": str(path)}])
    parts = [open_dataset(part, TOKENIZER, CHATML).prepare(max_seq_len=None) for part in options.sources]
    mix = Mix(parts, [Share(), Share()])
    first, second = mix.samples_of(0)[0], mix.samples_of(len(PAIRS))[0]
    assert trained_texts(TOKENIZER, second) == [PAIRS[0][1] + "<|im_end|>"]
    assert first.num_trained == len(first) - 1
