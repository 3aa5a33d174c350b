"""Public reports of the loop's area, by their numbers in the log of cases."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from tests.recipes.conftest import CASES, ROWS, metrics_of
from tests.recipes.test_kill_and_resume import finish
from tests.recipes.test_ranks import command
from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_tokenizer
from torchtune.errors import DataError
from torchtune.recipes.full_finetune import FullFinetuneRecipe
from torchtune.training.gradients import FiniteGuard

FROZEN = {"_component_": "torch.optim.SGD", "lr": 0.0}


def test_held_out_samples_may_be_longer_than_all_others(train, tmp_path):
    """They are evaluated whole, in packs of their own size."""
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"prompt": "a", "completion": "word " * 100}))
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    _, metrics = train(dataset={"path": str(data)}, eval_dataset={"path": str(held_out)}, max_seq_len=None, max_steps=1)
    assert metrics[-1]["eval_loss"] > 0


def test_large_files_are_refused_before_weights_as_far_as_row_20000(train, tmp_path, monkeypatch):
    """Behind the rendered rows: a broken line, an unknown role, a shape that the template refuses, a special token."""
    monkeypatch.setattr("torchtune.data.prepare.WHOLE_BYTES", 1000)
    monkeypatch.setattr("torchtune.data.prepare.FIRST_ROWS", 10)
    good = json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]})
    bad = {
        "broken": "{",
        "role": good.replace('"user"', '"usr"'),
        "no assistant": good.replace('"assistant"', '"user"'),
        "special": good.replace("hi", "hi <|im_end|>"),
    }
    for name, line in bad.items():
        data = tmp_path / f"{name}.jsonl"
        data.write_text("\n".join([good] * 40 + [line] + [good] * 40))
        with pytest.raises(DataError, match=r"jsonl:41: "):
            train(dataset={"path": str(data)}, max_steps=1, output_dir=str(tmp_path / name))
        assert not (tmp_path / name).exists()
    fine = tmp_path / "fine.jsonl"
    fine.write_text("\n".join([good] * 80))
    _, metrics = train(dataset={"path": str(fine)}, epochs=1, max_steps=50, output_dir=str(tmp_path / "out"))
    per_row = len(tiny_tokenizer()("yes")["input_ids"]) + 1
    assert sum(line["trained_tokens"] for line in metrics) == 80 * per_row


def test_case_c035_padding_is_masked_by_position(train, tmp_path):
    """pad_token == eos_token: the end of turn of both rows is trained, and the loss is that of the rows alone."""
    source = save_tiny_checkpoint(tmp_path / "source")
    tiny_tokenizer(pad_token="<|im_end|>").save_pretrained(source)
    rows = [json.dumps({"prompt": "a?", "completion": text}) for text in ("yes", "a much longer answer than yes")]
    found = []
    for name, chosen in (("both", rows), ("first", rows[:1]), ("second", rows[1:])):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("\n".join(chosen))
        keys = {"dataset": {"path": str(data)}, "model_checkpoint": str(source), "output_dir": str(tmp_path / name)}
        _, metrics = train(packed=False, batch_size=2, max_steps=1, optimizer=FROZEN, **keys)
        found.append((metrics[0]["loss"], metrics[0]["trained_tokens"]))
    (both, count), *alone = found
    assert count == sum(tokens for _, tokens in alone)
    assert both == pytest.approx(sum(loss * tokens for loss, tokens in alone) / count, rel=1e-6)


def test_case_c050_what_is_logged_is_of_the_whole_step(train):
    """One line a step: the loss over all micro-batches' tokens, and their exact number."""
    rows = [json.loads(line)["messages"] for line in (CASES / "C046.jsonl").read_text().splitlines()]
    tokenizer = tiny_tokenizer()
    answers = [m["content"] for messages in rows for m in messages if m["role"] == "assistant"]
    dataset = {"path": str(CASES / "C046.jsonl")}
    _, metrics = train(dataset=dataset, packed=False, batch_size=1, gradient_accumulation_steps=4, max_steps=1)
    assert len(metrics) == 1
    ends_of_turn = len(answers)
    assert metrics[0]["trained_tokens"] == sum(len(tokenizer(text)["input_ids"]) for text in answers) + ends_of_turn
    whole = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in rows]
    assert metrics[0]["tokens"] == sum(len(tokenizer(text)["input_ids"]) for text in whole)


@pytest.mark.parametrize("wrong", ["tokenizer", "dataset", "eval_dataset", "output_dir"])
def test_case_c115_a_wrong_path_is_told_before_a_weight_is_read(checkpoint, tmp_path, wrong):
    """In seconds, with weights that could not be read at all."""
    model = tmp_path / "model"
    model.mkdir()
    for file in checkpoint.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    weights = model / "model.safetensors"
    header = weights.read_bytes()[: 8 + int.from_bytes(weights.read_bytes()[:8], "little")]
    size = weights.stat().st_size
    weights.write_bytes(header)
    os.truncate(weights, size)  # zeros where the weights were
    (tmp_path / "a_file").touch()
    paths = {
        "tokenizer": "nowhere",
        "dataset": "nowhere.jsonl",
        "eval_dataset": "nowhere.jsonl",
        "output_dir": "a_file/out",
    }
    keys = {"model_checkpoint": model, "dataset": ROWS, "output_dir": "out"} | {wrong: paths[wrong]}
    arguments = [sys.executable, "-m", "torchtune.cli.tune", "run", "full_finetune"]
    start = time.monotonic()
    done = finish([*arguments, *(f"{key}={value}" for key, value in keys.items())], cwd=tmp_path)
    assert time.monotonic() - start < 15  # most of it is torch's own import, on a busy machine
    assert done.returncode == 2, done.stderr
    assert wrong in done.stderr
    assert not (tmp_path / "out").exists()


class CountingWaits(TorchDispatchMode):
    """Counts what makes a host wait for its device: values read out of tensors, and sizes that depend on values."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(wait in func._schema.name for wait in self.WAITS):
            self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_case_c128_nothing_waits_between_logged_steps(train, monkeypatch):
    """A line every 4 steps: the steps between read no value out of a tensor."""
    waits = {}
    # On a CPU the guard looks at every step, since there is nothing to wait for; here the CPU stands for a device.
    monkeypatch.setattr(FiniteGuard, "check", lambda *_: None)

    class Watched(FullFinetuneRecipe):
        def train(self):
            with CountingWaits() as self.mode:
                super().train()

        def _setup_observers(self, params):
            super()._setup_observers(params)
            keep_up = self._upkeep.after_step

            def after_step(epoch, metrics):
                over = keep_up(epoch, metrics)
                waits[self.total_training_steps] = self.mode.found
                self.mode.found = []
                return over

            self._upkeep.after_step = after_step

    train(max_steps=8, log_every_n_steps=4, recipe_class=Watched)
    assert waits.pop(4)
    assert waits.pop(8)
    assert waits == {1: [], 2: [], 3: [], 5: [], 6: [], 7: []}


@pytest.mark.timeout(120)
def test_sigusr1_saves_and_the_run_goes_on(checkpoint, tmp_path):
    """A checkpoint of the step at hand, asked for from outside."""
    out = tmp_path / "out"
    process = subprocess.Popen(command(checkpoint, out, "epochs=400"), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    while not list(out.glob("step_*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    saved = [folder.name for folder in out.glob("step_*")]
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert len(saved) == 1
    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert len(metrics_of(out)) > int(saved[0].removeprefix("step_"))


@pytest.mark.parametrize("end", [{"epochs": 1}, {"max_steps": 2}], ids=["epochs", "max_steps"])
def test_a_finished_run_has_nothing_left_to_do(train, tmp_path, capsys, end):
    """Resumed at its end it writes nothing new and says so."""
    keys = {"output_dir": str(tmp_path / "out"), "save_last": True} | end
    _, metrics = train(**keys)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("step_*/**/*")}
    _, again = train(resume_from_checkpoint=True, **keys)
    assert again == metrics
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("step_*/**/*")} == before
    assert "nothing left to train" in capsys.readouterr().err


def test_a_run_that_only_measures_the_norm_saves_and_resumes(train, capsys):
    """clip_grad_norm=inf, for which JSON has no number; and how a model is spread is no change."""
    keys = {"clip_grad_norm": float("inf"), "save_last": True, "lr_scheduler": {"name": "constant"}}
    train(**keys, max_steps=1)
    capsys.readouterr()
    _, metrics = train(**keys, max_steps=2, resume_from_checkpoint=True, enable_activation_checkpointing=True)
    assert [line["step"] for line in metrics] == [1, 2]
    told = "".join(capsys.readouterr())
    assert "max_steps was 1 and is now 2" in told
    assert "clip_grad_norm" not in told
    assert "enable_activation_checkpointing" not in told
