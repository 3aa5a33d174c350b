"""tune run evaluate: lm-eval's numbers are those of its own hf model; the loss that of each row alone."""

import json

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.recipes.conftest import ROWS, labelled
from tests.recipes.local_tasks import write_tasks
from torchtune.cli.tune import call
from torchtune.errors import ConfigError


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


def ours(tmp_path, checkpoint, tasks, *keys):
    output = tmp_path / "results.json"
    names = "tasks=[local_choice,local_likelihood,local_rolling,local_until]"
    shared = (
        f"model_checkpoint={checkpoint}",
        f"include_path={tasks}",
        "dtype=fp32",
        "device=cpu",
        "log_samples=true",
        "bootstrap_iters=0",
    )
    assert call(["run", "evaluate", *shared, names, f"output={output}", *keys]) == 0
    return json.loads(output.read_text())


def theirs(checkpoint, tasks, **options):
    hf = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(checkpoint),
        batch_size=4,
        device="cpu",
    )
    names = ["local_choice", "local_likelihood", "local_rolling", "local_until"]
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), 42)
    return simple_evaluate(
        hf, tasks=names, task_manager=TaskManager(include_path=str(tasks)), **seeds, bootstrap_iters=0, **options
    )


@pytest.mark.parametrize(
    ("keys", "options"),
    [
        ((), {}),
        (("num_fewshot=2",), {"num_fewshot": 2}),
        (
            ("apply_chat_template=true", "system=short", "limit=7"),
            {"apply_chat_template": True, "limit": 7, "system_instruction": "short"},
        ),
        (
            ("apply_chat_template=true", "num_fewshot=1", "fewshot_as_multiturn=true"),
            {"apply_chat_template": True, "num_fewshot": 1, "fewshot_as_multiturn": True},
        ),
    ],
    ids=["plain", "few shots", "template", "turns"],
)
def test_numbers_are_those_of_lm_evals_own_hf_model(chat_model, tasks, tmp_path, keys, options):
    """Every metric, every score and every answer."""
    found, expected = ours(tmp_path, chat_model, tasks, *keys), theirs(chat_model, tasks, **options)
    for task, metrics in expected["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert found["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)
    for task, samples in expected["samples"].items():
        assert len(samples) == len(found["samples"][task])
        for one, other in zip(samples, found["samples"][task], strict=True):
            if task == "local_until":
                assert other["resps"] == one["resps"]
            else:
                flat = [str(value) for value in json.loads(json.dumps(one["resps"], default=str))]
                assert len(flat) == len(other["resps"])
    answers = {json.dumps(sample["resps"]) for sample in found["samples"]["local_until"]}
    assert len(answers) > 2, "a model that says one thing alone would hide everything"


def test_the_loss_of_a_data_set_is_that_of_each_row_alone(chat_model, tmp_path):
    output = tmp_path / "results.json"
    keys = (f"model_checkpoint={chat_model}", f"dataset={ROWS}", "dtype=fp32", "device=cpu", f"output={output}")
    assert call(["run", "evaluate", *keys]) == 0
    found = json.loads(output.read_text())["dataset"]
    reference = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32)
    total, count = 0.0, 0
    for ids, labels in labelled(AutoTokenizer.from_pretrained(chat_model), ROWS):
        with torch.no_grad():
            logits = reference(ids).logits[0, :-1]
        targets = labels[0, 1:]
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=-100).item()
        count += int((targets != -100).sum())
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["tasks=[local_choise]"], "local_choice"),
        ([], "there is nothing to measure"),
        (["tasks=local_choice", "include_path=nowhere"], "include_path"),
        (["tasks=local_choice", "output=nowhere/results.json"], "output"),
    ],
)
def test_bad_input_is_refused_before_weights_load(chat_model, tasks, monkeypatch, keys, said):
    monkeypatch.setattr("torchtune.recipes.adapted.AdaptedCheckpoint.load", lambda *_, **__: pytest.fail("read"))
    folder = [] if any(key.startswith("include") for key in keys) else [f"include_path={tasks}"]
    with pytest.raises(ConfigError) as caught:
        call(["run", "evaluate", f"model_checkpoint={chat_model}", *folder, *keys])
    assert said in str(caught.value)
