"""tune run generate: prompts of every kind, against transformers; what is refused."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from torchtune.cli.tune import call
from torchtune.errors import CheckpointError, ConfigError, DataError


def answers(tmp_path, *keys):
    output = tmp_path / "answers.jsonl"
    assert call(["run", "generate", *keys, f"output={output}", "dtype=fp32", "device=cpu"]) == 0
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def theirs(folder, ids, new=12):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False)
    return found[0, len(ids) :].tolist()


def test_rows_of_every_kind(chat_model, tmp_path):
    """A string and messages are the same question, an answer in the row is only what is expected."""
    rows = [
        {"prompt": "What is a pipe?"},
        {"messages": [{"role": "user", "content": "What is a pipe?"}, {"role": "assistant", "content": "a tube"}]},
        {"conversations": [{"from": "human", "value": "What is a pipe?"}]},
        {"question": "What is a pipe?", "answer": "a tube"},
        {"instruction": "What is", "input": "a pipe?"},
        {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is a pipe?"}]},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = answers(tmp_path, f"model_checkpoint={chat_model}", f"prompts={file}", "max_new_tokens=12")
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    asked = [
        [{"role": "user", "content": "What is a pipe?"}],
        [{"role": "user", "content": "What is\n\na pipe?"}],
        [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is a pipe?"}],
    ]
    texts = []
    for messages in asked:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        texts.append(tokenizer.decode(theirs(chat_model, ids), skip_special_tokens=True))
    assert [row["text"] for row in found] == [texts[0]] * 4 + [texts[1], texts[2]]
    assert [row.get("expected") for row in found] == [None, "a tube", None, "a tube", None, None]
    assert len(set(texts)) == 3, "a model that says one thing alone would hide everything"
    assert found[0]["messages"] == asked[0]


def test_texts_are_gone_on_with_where_no_template_is_applied(chat_model, tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("one line\nanother one\n")
    keys = (f"model_checkpoint={chat_model}", f"prompts={file}", "apply_chat_template=false", "logprobs=true")
    found = answers(tmp_path, *keys, "max_new_tokens=12")
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    reference = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32)
    for row, line in zip(found, ["one line", "another one"], strict=True):
        ids = tokenizer(line)["input_ids"]
        expected = theirs(chat_model, ids)
        assert row["prompt"] == line
        assert row["token_ids"] == [token for token in expected if token != 3]  # which stops, and has a probability
        logits = reference(torch.tensor([ids + expected])).logits[0].log_softmax(-1)
        picked = [logits[len(ids) + place - 1, token].item() for place, token in enumerate(expected)]
        assert row["logprobs"] == pytest.approx(picked, abs=1e-4)
        assert row["finish_reason"] == ("stop" if 3 in expected else "length")


def test_what_is_drawn_does_not_depend_on_the_batch(chat_model, tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("".join(f"line {number}\n" for number in range(9)))
    keys = (f"model_checkpoint={chat_model}", f"prompts={file}", "temperature=1.5", "top_k=30", "max_new_tokens=10")
    one = answers(tmp_path, *keys, "batch_size=1", "seed=3")
    many = answers(tmp_path, *keys, "batch_size=4", "seed=3")
    other = answers(tmp_path, *keys, "batch_size=4", "seed=4")
    assert [row["text"] for row in one] == [row["text"] for row in many] != [row["text"] for row in other]


def test_case_c121_every_stop_of_the_generation_config_and_texts_of_the_users(chat_model, tmp_path):
    keys = (f"model_checkpoint={chat_model}", 'prompt="tell me"', "max_new_tokens=12", "logprobs=true")
    (free,) = answers(tmp_path, *keys)
    third = free["token_ids"][2]
    stopping = tmp_path / "stopping"
    shutil.copytree(chat_model, stopping)
    (stopping / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, third]}))
    (found,) = answers(tmp_path, f"model_checkpoint={stopping}", *keys[1:])
    first = free["token_ids"].index(third)
    assert found["token_ids"] == free["token_ids"][:first]
    assert found["finish_reason"] == "stop"
    stop = free["text"][2:5]
    (found,) = answers(tmp_path, *keys, f"stop={json.dumps([stop])}")
    assert found["text"] == free["text"][: free["text"].index(stop)]
    assert found["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("keys", "error", "said"),
    [
        (["prompt=hi", "max_new_tokens=0"], ConfigError, "max_new_tokens"),
        (["prompt=hi", "temperature=-1"], ConfigError, "temperature"),
        (["max_new_tokens=5"], ConfigError, "there is nothing to answer"),
        (["prompt=hi", "promt=x"], ConfigError, "prompt"),
        (["prompts=nowhere.jsonl"], DataError, "nowhere.jsonl"),
        (["prompt=" + "word " * 300], ConfigError, "256 positions"),
        (["prompt=hi", "adapter=nowhere"], CheckpointError, "nowhere"),
        (["prompt=hi", "output=nowhere/a.jsonl"], ConfigError, "output"),
    ],
)
def test_bad_input_is_refused_before_weights_load(chat_model, monkeypatch, keys, error, said):
    monkeypatch.setattr("torchtune.recipes.adapted.AdaptedCheckpoint.load", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(error) as caught:
        call(["run", "generate", f"model_checkpoint={chat_model}", *keys])
    assert said in str(caught.value)


def test_the_context_ends_an_answer_and_it_is_told(chat_model, tmp_path, capsys):
    """C119: with prompt, new tokens and limit."""
    (found,) = answers(tmp_path, f"model_checkpoint={chat_model}", "prompt=hello", "max_new_tokens=400")
    assert "max_new_tokens=400, and their answers end with the model's 256 positions" in capsys.readouterr().err
    assert found["finish_reason"] in ("length", "stop")
    assert found["num_tokens"] < 256


def test_adapters_are_merged_and_an_adapters_folder_is_a_model(chat_model, tmp_path):
    """As PEFT answers over the base, with the base named or found in the adapter's config."""
    from peft import LoraConfig, get_peft_model

    reference = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32)
    adapted = get_peft_model(
        reference, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    ids = AutoTokenizer.from_pretrained(chat_model)("one line")["input_ids"]
    expected = adapted.generate(input_ids=torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    expected = [token for token in expected.tolist() if token != 3]
    common = ('prompt="one line"', "apply_chat_template=false", "logprobs=true", "max_new_tokens=12")
    for keys in (
        (f"model_checkpoint={chat_model}", f"adapter={tmp_path / 'adapter'}"),
        (f"adapter={tmp_path / 'adapter'}",),
        (f"model_checkpoint={tmp_path / 'adapter'}",),
    ):
        (row,) = answers(tmp_path, *keys, *common)
        assert row["token_ids"] == expected
    (plain,) = answers(tmp_path, f"model_checkpoint={chat_model}", *common)
    assert plain["token_ids"] != expected


def test_ranks_share_the_prompts(chat_model, tmp_path):
    """Seven prompts on two ranks, drawn: as one process answers them."""
    from tests.launching import start

    file = tmp_path / "lines.txt"
    file.write_text("".join(f"line {number}\n" for number in range(7)))
    keys = [f"model_checkpoint={chat_model}", f"prompts={file}", "temperature=1.2", "max_new_tokens=6"]
    alone = answers(tmp_path, *keys)
    output = tmp_path / "together.jsonl"
    process = start(
        ["--nproc_per_node", "2", "generate", *keys, f"output={output}", "dtype=fp32", "device=cpu"], cwd=tmp_path
    )
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert [json.loads(line) for line in output.read_text().splitlines()] == alone
