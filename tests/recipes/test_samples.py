"""Samples in the middle of training: what transformers says from the checkpoint of that step; training is not touched."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.recipes.many_ranks import train as train_on_ranks
from torchtune.cli.tune import call
from torchtune.errors import ConfigError

KEYS = {
    "epochs": 1,
    "max_steps": 4,
    "save_every_n_steps": 2,
    "optimizer": {"_component_": "torch.optim.SGD", "lr": 0.5},
}


def lines(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_answers_are_those_of_the_checkpoint(train, tmp_path):
    samples = {"prompts": ["hello there", "2 + 2"], "every_n_steps": 2, "max_new_tokens": 10}
    _, with_samples = train(**KEYS, samples=samples)
    found = lines(tmp_path / "out")
    assert [(line["step"], line["prompt"]) for line in found] == [
        (2, "hello there"), (2, "2 + 2"), (4, "hello there"), (4, "2 + 2"),
    ]  # fmt: skip
    for line in found:
        folder = tmp_path / "out" / f"step_{line['step']}"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        messages = [{"role": "user", "content": line["prompt"]}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = model.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :]
        assert line["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    _, without = train(**KEYS, output_dir=str(tmp_path / "without"))
    assert [line["loss"] for line in with_samples] == [line["loss"] for line in without]


def test_a_resumed_run_has_each_line_once(train, tmp_path):
    samples = {"prompts": "hello", "every_n_steps": 1, "max_new_tokens": 3}
    train(**KEYS | {"max_steps": 3, "save_last": False}, samples=samples)
    train(**KEYS, samples=samples, resume_from_checkpoint=True)
    assert [line["step"] for line in lines(tmp_path / "out")] == [1, 2, 3, 4]


@pytest.mark.parametrize("keys", [(), ("context_parallel=2",)], ids=["fsdp", "context"])
def test_ranks_answer_as_one_device(checkpoint, tmp_path, two_ranks, keys):
    from tests.recipes.conftest import ROWS

    common = (
        f"model_checkpoint={checkpoint}", f"dataset={ROWS}", "dtype=fp32", "max_steps=2", "max_seq_len=128", "save_last=false",
        "batch_size=1", "samples.prompts=[hello, again]", "samples.every_n_steps=1", "samples.max_new_tokens=6",
    )  # fmt: skip
    shares = 2 if keys else 1
    train_on_ranks("full_finetune", (*common, f"output_dir={tmp_path / 'one'}", "gradient_accumulation_steps=2"))
    many = (*common, f"output_dir={tmp_path / 'two'}", f"gradient_accumulation_steps={shares}", *keys)
    two_ranks.run(train_on_ranks, "full_finetune", many)
    assert lines(tmp_path / "two") == lines(tmp_path / "one")


def test_ranks_that_share_tokens_are_refused(checkpoint):
    keys = [f"model_checkpoint={checkpoint}", "dataset=x", "samples=a", "tensor_parallel=2"]
    with pytest.raises(ConfigError, match="samples: are not made under tensor_parallel"):
        call(["validate", "--nproc_per_node", "2", "full_finetune", *keys])


def test_a_prompt_as_long_as_the_context_is_refused(checkpoint, tmp_path):
    from tests.recipes.conftest import ROWS

    keys = [f"model_checkpoint={checkpoint}", f"dataset={ROWS}", f"output_dir={tmp_path / 'out'}", "max_steps=1"]
    with pytest.raises(ConfigError, match=r"samples.prompts: a prompt has \d+ tokens, and the model \d+ positions"):
        call(["run", "full_finetune", *keys, "samples=" + "word " * 5000])
