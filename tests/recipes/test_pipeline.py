"""Several stages in one script, by the command line: what each leaves is what the next starts from."""

import json
import subprocess
import sys

import pytest
import torch
from transformers.models.auto import AutoModelForCausalLM

from tests.recipes.conftest import ROWS
from torchtune.checkpoint.load import load_model
from torchtune.cli.tune import run
from torchtune.recipes.evaluate import EvaluateParams, EvaluateRecipe
from torchtune.recipes.pipeline import HELD_OUT

pytestmark = pytest.mark.usefixtures("one_thread")


def keys_of(checkpoint, out, *keys):
    """A run of two steps on a tiny model; later keys win."""
    finetune = (
        f"model_checkpoint={checkpoint}",
        f"dataset={ROWS}",
        f"eval_dataset={ROWS}",
        "dtype=fp32",
        "max_steps=2",
    )
    return [
        f"output_dir={out}",
        *(f"finetune.{key}" for key in finetune),
        *(f"evaluate.{key}" for key in (f"dataset={ROWS}", "dtype=fp32")),
        *("quantize.kind=fp8", "export.gguf_type=f32"),
        *keys,
    ]


def loss_of(model, **keys):
    """By the recipe evaluate."""
    params = EvaluateParams(model_checkpoint=str(model), dataset=str(ROWS), dtype="fp32", **keys)
    recipe = EvaluateRecipe(params)
    recipe.setup(params)
    return recipe.evaluate()["dataset"]["loss"]


def test_each_stage_starts_from_what_the_one_before_left(checkpoint, tmp_path, capsys):
    """Folders of all stages; the GGUF file has the fine-tuned weights; losses are those that evaluate tells of each."""
    out = tmp_path / "out"
    assert run(["run", "pipeline", *keys_of(checkpoint, out)]) == 0
    assert {entry.name for entry in out.iterdir()} == {"finetuned", "quantized", "exported", "results.json"}
    step, file = out / "finetuned" / "step_2", out / "exported" / "exported-F32.gguf"
    expected = load_model(step).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_model(file).state_dict().items())
    config = json.loads((out / "quantized" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "float-quantized"
    found = json.loads((out / "results.json").read_text())
    models = {"base": checkpoint, "finetuned": step, "quantized": out / "quantized", "exported": file}
    assert {name: measured["loss"] for name, measured in found.items()} == {
        name: pytest.approx(loss_of(model), rel=1e-6) for name, model in models.items()
    }
    assert found["finetuned"]["loss"] == found["exported"]["loss"] != found["base"]["loss"]
    assert "quantized  loss" in capsys.readouterr().err


def test_a_second_run_is_refused_and_a_resumed_one_does_what_is_left(checkpoint, tmp_path, capsys):
    """Of a pipeline that ended in its third stage, to the same bits as one that did not."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(["run", "pipeline", *keys_of(checkpoint, whole)]) == 0
    keys = keys_of(checkpoint, out)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("torchtune.recipes.pipeline.QuantizeRecipe.quantize", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(["run", "pipeline", *keys])
    capsys.readouterr()
    assert run(["run", "pipeline", *keys]) == 2
    assert "out is there and not empty" in capsys.readouterr().err
    before = (out / "finetuned" / "step_2" / "model.safetensors").stat().st_mtime_ns
    assert run(["run", "pipeline", *keys, "resume=true"]) == 0
    assert (out / "finetuned" / "step_2" / "model.safetensors").stat().st_mtime_ns == before
    for name in ("quantized/model.safetensors", "exported/exported-F32.gguf"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert run(["run", "pipeline", *keys, "resume=true"]) == 0
    assert f"{out}/quantized: is there, and left as it is" in capsys.readouterr().err


def test_what_a_later_stage_refuses_is_refused_before_the_first(checkpoint, tmp_path, capsys):
    """A kind, a group that does not divide, a type, rows that are not there; by validate too, and nothing is written."""
    wrong = {
        "quantize.kind=int5": "int5",
        "quantize.group_size=7": "group_size",
        "export.gguf_type=q8_1": "did you mean 'q8_0'?",
        "export.model_checkpoint=nowhere": "nowhere",
        "evaluate.dataset=no_rows.jsonl": "no_rows.jsonl",
        "finetune.save_last=false": "leaves nothing for the stages after it",
        f"evaluate.dataset={HELD_OUT}": "finetune.dataset is not; give rows of your own",
        "evaluate.model_checkpoint=another": "each stage's model is measured",
    }
    for key, reason in wrong.items():
        for verb in ("validate", "run"):
            keys = keys_of(checkpoint, tmp_path / "out", "quantize.kind=int8", key)
            assert run([verb, "pipeline", *keys]) in (1, 2), key
            assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_copy_runs(checkpoint, tmp_path):
    """`tune cp`, and the copy under another name, as a user changes it."""
    assert run(["cp", "pipeline", str(tmp_path / "mine.py")]) == 0
    command = [sys.executable, "-m", "torchtune.cli.tune", "run", "mine.py", *keys_of(checkpoint, "out")]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "exported", gguf_file="exported-F32.gguf")
