"""lm-eval's tasks in the middle of training: the numbers of `evaluate` on the checkpoint of that step."""

import json
import sys

import pytest

from tests.recipes.conftest import ROWS
from tests.recipes.local_tasks import write_tasks
from tests.recipes.many_ranks import train as train_on_ranks
from torchtune.cli.tune import call
from torchtune.errors import ConfigError, MissingDependencyError

KEYS = {
    "epochs": 1,
    "max_steps": 4,
    "save_every_n_steps": 2,
    "optimizer": {"_component_": "torch.optim.SGD", "lr": 0.5},
}
NAMES = ["local_choice", "local_likelihood", "local_rolling", "local_until"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


def measured(folder):
    """By step, the tasks' metrics of the lines of metrics.jsonl that have any."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: {name: value for name, value in line.items() if "/" in name} for line in lines}
    return {step: metrics for step, metrics in found.items() if metrics}


def of_checkpoint(path, keys, tasks):
    """The same by `tune run evaluate`."""
    output = path.parent / f"{path.name}.json"
    shared = (f"include_path={tasks}", f"tasks=[{','.join(NAMES)}]", "dtype=fp32", "device=cpu", "bootstrap_iters=0")
    assert call(["run", "evaluate", *keys, *shared, f"output={output}"]) == 0
    results = json.loads(output.read_text())["results"]
    return {
        f"{task}/{name.removesuffix(',none')}": value
        for task, metrics in results.items()
        for name, value in metrics.items()
        if isinstance(value, float)
    }


def test_numbers_are_those_of_the_checkpoint(train, tasks, tmp_path):
    evaluation = {"tasks": NAMES, "include_path": str(tasks), "every_n_steps": 2}
    _, with_tasks = train(**KEYS, evaluation=evaluation)
    found = measured(tmp_path / "out")
    assert sorted(found) == [2, 4]
    for step, metrics in found.items():
        folder = tmp_path / "out" / f"step_{step}"
        assert metrics == pytest.approx(of_checkpoint(folder, [f"model_checkpoint={folder}"], tasks), rel=1e-5)
    assert found[2] != found[4]
    _, without = train(**KEYS, output_dir=str(tmp_path / "without"))
    assert [line["loss"] for line in with_tasks] == [line["loss"] for line in without]


def test_an_adapter_is_measured_with_its_base(checkpoint, tasks, tmp_path):
    out = tmp_path / "out"
    keys = (
        f"model_checkpoint={checkpoint}", f"dataset={ROWS}", f"output_dir={out}", "dtype=fp32", "device=cpu", "max_steps=2",
        "optimizer.lr=0.05", f"evaluation.tasks=[{','.join(NAMES)}]", f"evaluation.include_path={tasks}",
    )  # fmt: skip
    assert call(["run", "lora_finetune", *keys]) == 0
    expected = of_checkpoint(out / "step_2", [f"model_checkpoint={checkpoint}", f"adapter={out / 'step_2'}"], tasks)
    assert measured(out)[2] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("keys", [(), ("context_parallel=2",)], ids=["fsdp", "context"])
def test_ranks_measure_what_one_device_does(checkpoint, tasks, tmp_path, two_ranks, keys):
    common = (
        f"model_checkpoint={checkpoint}", f"dataset={ROWS}", "dtype=fp32", "max_steps=1", "max_seq_len=128", "save_last=false",
        "batch_size=1", "evaluation.tasks=[local_choice, local_until]", f"evaluation.include_path={tasks}", "evaluation.limit=5",
    )  # fmt: skip
    shares = 2 if keys else 1
    train_on_ranks("full_finetune", (*common, f"output_dir={tmp_path / 'one'}", "gradient_accumulation_steps=2"))
    many = (*common, f"output_dir={tmp_path / 'two'}", f"gradient_accumulation_steps={shares}", *keys)
    two_ranks.run(train_on_ranks, "full_finetune", many, timeout_s=240)  # each rank imports lm-eval
    assert measured(tmp_path / "two")[1] == pytest.approx(measured(tmp_path / "one")[1], rel=1e-4)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["evaluation=local_choise"], r"evaluation.tasks: there is no task 'local_choise'"),
        (["evaluation.include_path=nowhere", "evaluation.tasks=local_choice"], "evaluation.include_path: nowhere"),
        (["evaluation=local_choice", "tensor_parallel=2"], "evaluation: is not made under tensor_parallel"),
    ],
)
def test_what_cannot_be_asked_is_refused_first(checkpoint, keys, said):
    with pytest.raises(ConfigError, match=said):
        call(
            [
                "validate",
                "--nproc_per_node",
                "2",
                "full_finetune",
                f"model_checkpoint={checkpoint}",
                f"dataset={ROWS}",
                *keys,
            ]
        )


def test_a_missing_lm_eval_is_named(checkpoint, monkeypatch):
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises((ConfigError, MissingDependencyError), match="evaluation: tasks needs the package 'lm-eval'"):
        call(["run", "full_finetune", f"model_checkpoint={checkpoint}", f"dataset={ROWS}", "evaluation=local_choice"])
