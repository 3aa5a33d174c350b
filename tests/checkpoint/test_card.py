"""The model card of an exported run: its result, curve and config, and no path of the machine."""

import json
import xml.etree.ElementTree

import pytest
import yaml

from tests.recipes.conftest import ROWS
from tests.tiny_checkpoint import save_tiny_checkpoint
from torchtune.checkpoint.card import curve
from torchtune.cli.tune import call


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A LoRA run of three steps, saved at the second and the last."""
    folder = tmp_path_factory.mktemp("card")
    base = save_tiny_checkpoint(folder / "tiny-base")
    keys = (
        "max_steps=3",
        "save_every_n_steps=2",
        "eval_fraction=0.2",
        "eval_every_n_steps=1",
        "dtype=fp32",
        "lora_rank=4",
    )
    call(["run", "lora_finetune", f"model_checkpoint={base}", f"dataset={ROWS}", f"output_dir={folder / 'run'}", *keys])
    return folder / "run"


@pytest.mark.parametrize(("step", "merge"), [(2, "true"), (3, "false")])
def test_an_exported_run_has_a_card(run, tmp_path, step, merge):
    out = tmp_path / "mine"
    call(["run", "export", f"adapter={run}/step_{step}", f"output_dir={out}", f"merge={merge}"])
    text = (out / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == ("transformers" if merge == "true" else "peft")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][:step]
    assert f"| optimizer steps | {step} |" in body
    assert f"{metrics[0]['loss']:.4f} and {metrics[-1]['loss']:.4f}" in body
    assert f"{metrics[-1]['eval_loss']:.4f} and {min(line['eval_loss'] for line in metrics):.4f}" in body
    assert "tiny-base" in body
    assert "common_rows24.jsonl" in body
    assert "lora_rank: 4" in body
    assert str(run.parent) not in text, "a path of this machine"
    root = xml.etree.ElementTree.fromstring((out / "loss.svg").read_text())
    line = root.find("{http://www.w3.org/2000/svg}polyline")
    assert len(line.get("points").split()) == step


def test_the_curve_falls_where_the_loss_does():
    root = xml.etree.ElementTree.fromstring(curve([(1, 4.0), (2, 2.0), (3, 3.0)], [(3, 1.0)]))
    points = root.find("{http://www.w3.org/2000/svg}polyline").get("points").split()
    heights = [float(point.split(",")[1]) for point in points]  # from the top
    assert heights[0] < heights[2] < heights[1]
    (dot,) = root.findall("{http://www.w3.org/2000/svg}circle")
    assert float(dot.get("cy")) > heights[1]
