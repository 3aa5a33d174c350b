"""Components, overrides and interpolations (C113, C116), and what a wrong one is told."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from torchtune.config.parse import parse_params
from torchtune.config.strict import STRICT
from torchtune.errors import ConfigError
from torchtune.recipes.params import FinetuneParams

CASES = Path(__file__).parent.parent / "cases"
NEEDED = ("model_checkpoint=m", "dataset=d.jsonl")
ADAMW = "optimizer:\n  _component_: torch.optim.AdamW\n  lr: 1.0e-4\n  fused: true\n  betas: [0.9, 0.95]\n"


@dataclass(config=STRICT, kw_only=True)
class Free:
    """Keys of any value, for interpolations."""

    output_dir: str = "out"
    first: Any = None
    second: Any = None
    names: list[str] = Field(default_factory=list)
    nested: dict[str, Any] = Field(default_factory=dict)


def config(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return "--config", str(path)


def problems(cls, *argv):
    with pytest.raises(ConfigError) as raised:
        parse_params(cls, argv)
    return {problem.key: str(problem) for problem in raised.value.problems}


def test_case_c113_arguments_that_a_new_component_does_not_take(tmp_path):
    """Refused with the component, the arguments and the way to drop them; then dropped, it holds."""
    file = config(tmp_path, ADAMW)
    found = problems(FinetuneParams, *file, *NEEDED, "optimizer=torch.optim.SGD")
    assert "~optimizer.betas" in found["optimizer.betas"]
    assert "torch.optim.SGD" in found["optimizer.betas"]
    params = parse_params(FinetuneParams, [*file, *NEEDED, "optimizer=torch.optim.SGD", "~optimizer.betas"])
    assert params.optimizer == {"_component_": "torch.optim.SGD", "lr": 1e-4, "fused": True}
    torch.optim.SGD(
        [torch.zeros(1, requires_grad=True)], **{k: v for k, v in params.optimizer.items() if k != "_component_"}
    )


def test_case_c113_a_path_over_a_mapping(tmp_path):
    """`dataset=chats.jsonl` over a YAML mapping is the path; other keys of the mapping stay."""
    file = config(tmp_path, "dataset:\n  path: old.jsonl\n  limit: 3\n")
    params = parse_params(FinetuneParams, [*file, "model_checkpoint=m", "dataset=chats.jsonl"])
    assert params.dataset.path == "chats.jsonl"


def test_case_c113_a_removed_key_that_is_not_there_is_refused(tmp_path):
    """A misspelt `~key` would leave the argument where it is."""
    assert problems(FinetuneParams, *config(tmp_path, ADAMW), *NEEDED, "~optimizer.beta")


@pytest.mark.parametrize(
    ("argument", "key", "said"),
    [
        ("optimizer=torch.optim.Adamw", "optimizer", "did you mean 'AdamW'?"),
        ("optimizer=troch.optim.AdamW", "optimizer", "troch"),
        ("optimizer.learning_rate=1", "optimizer.learning_rate", "did you mean 'lr'?"),
        ("lr_scheduler.nmae=linear", "lr_scheduler.nmae", "did you mean 'lr_scheduler.name'?"),
        ("lr_scheduler.name=cosin", "lr_scheduler.name", "did you mean 'cosine'?"),
        ("max_step=3", "max_step", "did you mean 'max_steps'?"),
        ("packed=maybe", "packed", "maybe"),
        ("epochs=0", "epochs", "0"),
    ],
)
def test_a_mistake_is_told_by_key_with_the_nearest_name(argument, key, said):
    """One problem, at its own key."""
    found = problems(FinetuneParams, *NEEDED, argument)
    assert list(found) == [key]
    assert said in found[key]


def test_a_problem_in_a_file_names_its_line(tmp_path):
    """The line of the key itself."""
    file = config(tmp_path, "epochs: 2\n\nlr_scheduler:\n  name: cosine\n  warmup: 3\n")
    assert "config.yaml:5" in problems(FinetuneParams, *file, *NEEDED)["lr_scheduler.warmup"]


def test_a_key_written_twice_is_refused(tmp_path):
    """YAML would take the last one in silence."""
    assert problems(FinetuneParams, *config(tmp_path, "epochs: 2\nepochs: 3\n"), *NEEDED)


def test_case_c116_interpolation_is_resolved_after_overrides(tmp_path):
    """The value of the command line is the one referred to; environment variables are read."""
    file = config(tmp_path, "output_dir: out\nfirst: ${output_dir}/logs\nsecond: ${oc.env:HOME}\n")
    params = parse_params(Free, [*file, "output_dir=elsewhere"])
    assert params.first == "elsewhere/logs"
    assert params.second == os.environ["HOME"]


def test_case_c116_circles_and_missing_keys_are_told_by_key():
    """Every key of the case's file, with what it asks for."""
    lines = (CASES / "C116.yaml").read_text().splitlines()
    arguments = [f"nested.{line.replace(': ', '=', 1)}" for line in lines if line.startswith("missing")]
    found = problems(Free, "first=${second}", "second=${first}", *arguments)
    assert "circle" in found["first"]
    assert "circle" in found["second"]
    assert "no_such_key" in found["nested.missing"]


@pytest.mark.parametrize("argument", ["names=[q_proj,v_proj]", "names=[q_proj, v_proj]", "names=['q_proj','v_proj']"])
def test_case_c116_lists_are_replaced(tmp_path, argument):
    """Not merged with the file's."""
    file = config(tmp_path, "names: [q_proj, k_proj, v_proj]\n")
    assert parse_params(Free, [*file, argument]).names == ["q_proj", "v_proj"]


def test_case_c116_nested_keys_are_merged_and_mappings_replaced(tmp_path):
    """A dotted key changes one value; a whole mapping stands for itself."""
    file = config(tmp_path, "nested: {a: 1, b: {c: 2}}\n")
    assert parse_params(Free, [*file, "nested.b.c=3"]).nested == {"a": 1, "b": {"c": 3}}
    assert parse_params(Free, [*file, "nested={d: 4}"]).nested == {"d": 4}
    assert parse_params(Free, [*file, "~nested.b"]).nested == {"a": 1}


@pytest.mark.parametrize("text", ["a = b", "C:\\data\\x", "ünïcode 🎉", "with: colon", "#no comment", "{brace", "yes"])
def test_texts_arrive_as_they_are_written(text):
    """A shell's argument needs no second layer of quotes."""
    assert parse_params(Free, [f"output_dir={text}"]).output_dir == text


def test_text_for_json(tmp_path):
    """A JSON mapping is a YAML mapping."""
    value = {"a": [1, {"b": None}], "c": "d"}
    assert parse_params(Free, [f"nested={json.dumps(value)}"]).nested == value
