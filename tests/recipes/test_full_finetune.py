"""The main job against transformers: losses of the first two steps, and the checkpoint that comes out."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.models.auto import AutoModelForCausalLM

from tests.recipes.conftest import CASES, ROWS, labelled, metrics_of
from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_config
from torchtune.errors import ConfigError, DataError, TrainingError

SGD = {"_component_": "torch.optim.SGD", "lr": 0.1}
ALL_ROWS = [
    {"packed": False, "batch_size": 24, "gradient_accumulation_steps": 1},
    {"packed": False, "batch_size": 4, "gradient_accumulation_steps": 6},
    {"packed": True, "batch_size": 1, "gradient_accumulation_steps": 1, "max_seq_len": 512 * 4},
]


def reference_losses(checkpoint, rows, *, steps, lr):
    """Mean cross-entropy over the assistant's words and the token after them, by transformers, with plain SGD."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    losses = []
    for _ in range(steps):
        total, count = 0.0, 0
        for ids, labels in labelled(tokenizer, rows):
            logits = model(ids).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
            count += int((labels[0, 1:] != -100).sum())
        loss = total / count
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= lr * parameter.grad
    return losses


@pytest.mark.parametrize("batching", ALL_ROWS, ids=["padded-24", "accumulated-4x6", "packed"])
def test_losses_of_two_steps_equal_transformers(train, tmp_path, batching):
    """Shows 1: forward by step 1, gradients by step 2, whatever way the rows are batched."""
    checkpoint = save_tiny_checkpoint(tmp_path / "long", tiny_config(max_position_embeddings=4096))
    _, metrics = train(
        model_checkpoint=str(checkpoint),
        optimizer=SGD,
        max_steps=2,
        clip_grad_norm=None,
        lr_scheduler={"name": "constant", "num_warmup_steps": 0},
        **batching,
    )
    expected = reference_losses(checkpoint, ROWS, steps=2, lr=0.1)
    assert [line["loss"] for line in metrics] == pytest.approx(expected, abs=1e-5)


def test_case_c046_accumulation_changes_nothing(train, tmp_path):
    """Gradients weigh every trained token alike: (4, 1), (2, 2) and (1, 4) give the same loss and norm."""
    found = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        _, metrics = train(
            dataset={"path": str(CASES / "C046.jsonl")},
            packed=False,
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            output_dir=str(tmp_path / f"{batch_size}x{accumulation}"),
        )
        found.append((metrics[0]["loss"], metrics[0]["grad_norm"], metrics[0]["trained_tokens"]))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


def test_case_c049_held_out_loss_is_the_same_for_any_batch_size(train, tmp_path):
    """A mean over tokens, not over batches."""
    found = []
    for batch_size in (1, 2, 4):
        _, metrics = train(
            eval_dataset={"path": str(CASES / "C046.jsonl")},
            packed=False,
            batch_size=batch_size,
            max_steps=1,
            optimizer={"_component_": "torch.optim.SGD", "lr": 0.0},
            output_dir=str(tmp_path / str(batch_size)),
        )
        found.append(metrics[-1]["eval_loss"])
    assert found[1:] == pytest.approx([found[0]] * 2, rel=1e-6)


def test_case_c100_steps_epochs_and_micro_batches_are_counted_once(train):
    """max_steps_per_epoch counts optimizer steps: two epochs of three are six, three in each."""
    _, metrics = train(packed=False, batch_size=1, gradient_accumulation_steps=2, max_steps_per_epoch=3, epochs=2)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in metrics] == [1, 1, 1, 2, 2, 2]
    assert [line["tokens"] for line in metrics[:3]] != [line["tokens"] for line in metrics[3:]]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_saved_folder_loads_in_transformers(train, tmp_path, tied, dtype):
    """Shows 3, C058, C061: same names and types as the source, nothing missing, fields and template kept."""
    config = tiny_config(tie_word_embeddings=tied)
    source = save_tiny_checkpoint(tmp_path / "source", config, dtype=dtype)
    recipe, _ = train(model_checkpoint=str(source), max_steps=2, save_last=True)
    folder = Path(recipe._params.output_dir) / "step_2"
    before, after = load_file(source / "model.safetensors"), load_file(folder / "model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    assert any(not torch.equal(before[name], after[name]) for name in before)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tied
    kept = json.loads((folder / "config.json").read_text())
    assert json.loads((source / "config.json").read_text()).items() <= kept.items()
    assert AutoTokenizer.from_pretrained(folder).chat_template == AutoTokenizer.from_pretrained(source).chat_template
    ids = torch.arange(20)[None]
    if dtype == torch.float32:
        torch.testing.assert_close(recipe._model(ids), model(ids).logits, rtol=0, atol=1e-5)


def test_activation_checkpointing_changes_no_bit(train, tmp_path):
    """Shows 7: the same operations on the same numbers."""
    _, plain = train(max_steps=4, output_dir=str(tmp_path / "plain"))
    _, checkpointed = train(max_steps=4, enable_activation_checkpointing=True, output_dir=str(tmp_path / "ac"))
    keys = ("loss", "grad_norm")
    assert [[line[key] for key in keys] for line in plain] == [[line[key] for key in keys] for line in checkpointed]


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 0.02), ("fp16", 0.005)])
def test_half_precision_follows_fp32(train, tmp_path, dtype, tolerance):
    """Shows 7: 20 steps in half precision stay within 2 % (bf16, 8 bits) and 0.5 % (fp16, 11 bits) of fp32's loss."""
    _, exact = train(max_steps=20, output_dir=str(tmp_path / "fp32"))
    _, half = train(max_steps=20, dtype=dtype, output_dir=str(tmp_path / dtype))
    assert [line["loss"] for line in half] == pytest.approx([line["loss"] for line in exact], rel=tolerance)


def test_a_loss_that_is_not_finite_stops_the_run(train, tmp_path):
    """The step and the rows are named, and the checkpoint before it stands."""
    out = tmp_path / "nan"
    with pytest.raises(TrainingError, match=r"step \d+: the summed loss is .*common_rows24.jsonl:\d+"):
        train(
            optimizer={"_component_": "torch.optim.SGD", "lr": 1e12},
            clip_grad_norm=None,
            save_every_n_steps=1,
            output_dir=str(out),
            max_steps=10,
        )
    steps = sorted(int(folder.name.removeprefix("step_")) for folder in out.glob("step_*"))
    assert steps
    last = load_file(out / f"step_{steps[-1]}" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in last.values())
    assert len(metrics_of(out)) == steps[-1]


def test_a_data_set_smaller_than_a_batch_trains(train, tmp_path):
    """C053: the partial batch is a step, never nothing."""
    rows = tmp_path / "six.jsonl"
    rows.write_text("".join(ROWS.read_text().splitlines(keepends=True)[:6]))
    _, metrics = train(dataset={"path": str(rows)}, packed=False, batch_size=64, epochs=2)
    assert len(metrics) == 2


def test_nothing_to_train_on_is_refused(train, tmp_path):
    """A file whose rows have no assistant turn can't be a success."""
    rows = tmp_path / "users.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    with pytest.raises(DataError):
        train(dataset={"path": str(rows)})
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_overwritten(train):
    """The same command again is refused with the way on."""
    train(max_steps=1, save_last=True)
    with pytest.raises(ConfigError, match="already holds a run with checkpoints up to step 1"):
        train(max_steps=1)


def test_keep_last_and_best(train):
    """Old checkpoints go, the best by held-out loss stays and is pointed to."""
    recipe, metrics = train(
        eval_fraction=0.2, eval_every_n_steps=2, save_every_n_steps=1, keep_last=2, max_steps=6, packed=False
    )
    out = Path(recipe._params.output_dir)
    losses = {line["step"]: line["eval_loss"] for line in metrics if "eval_loss" in line}
    best = min(losses, key=losses.get)
    assert {folder.name for folder in out.glob("step_*")} == {"step_5", "step_6", f"step_{best}"}
    assert (out / "best").resolve().name == f"step_{best}"
    assert (out / "best" / "model.safetensors").exists()


def test_two_recipes_in_one_process_leave_nothing_behind(train, tmp_path):
    """A second run in the same process is the same as a first one, and no thread stays."""
    import threading

    before = threading.active_count()
    _, first = train(max_steps=3, output_dir=str(tmp_path / "one"))
    _, second = train(max_steps=3, output_dir=str(tmp_path / "two"))
    assert [line["loss"] for line in first] == [line["loss"] for line in second]
    assert threading.active_count() == before
