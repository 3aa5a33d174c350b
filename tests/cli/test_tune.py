"""The command as a person types it: verbs, wrong names, wrong keys, copies that run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_checkpoint import save_tiny_checkpoint
from torchtune.recipes.registry import FORMER_NAMES, configs, recipes

ROWS = Path(__file__).parent.parent / "cases" / "common_rows24.jsonl"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("cli") / "tiny-llama")


def tune(*arguments, cwd=None, code="pass", env=None):
    """Run the command; `code` runs before it in the same process."""
    program = [sys.executable, "-c", f"import sys; {code}; from torchtune.cli.tune import main; main()"]
    return subprocess.run(
        [*program, *map(str, arguments)], capture_output=True, text=True, timeout=120, cwd=cwd, check=False, env=env
    )


FORBID = "sys.modules.update(dict.fromkeys(['torch', 'pydantic', 'transformers']))"


@pytest.mark.parametrize("arguments", [["--help"], ["ls"], ["cat", "full_finetune"]])
def test_light_verbs_need_no_torch(arguments):
    """`tune --help`, `ls` and `cat` work where torch can't be imported, so they never wait for it."""
    done = tune(*arguments, code=FORBID)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_a_run_never_imports_transformers(checkpoint, tmp_path):
    """transformers is an oracle of the tests, not a part of the package."""
    keys = (f"model_checkpoint={checkpoint}", f"dataset={ROWS}", f"output_dir={tmp_path}/out", "max_steps=1")
    done = tune("run", "full_finetune", *keys, code="sys.modules['transformers'] = None")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rnu"], "did you mean 'run'?"),
        (["run", "full_fintune"], "did you mean 'full_finetune'?"),
        (["run", "full_finetune_single_device"], "is called 'full_finetune' here"),
        (["run", "full_finetune", "--config", "full_finetun"], "did you mean 'full_finetune'?"),
        (["cp", "full_finetun", "x.py"], "did you mean 'full_finetune'?"),
        (["run", "nowhere.py"], "there is no file 'nowhere.py'"),
        (["validate", "full_finetune", "epoch=1"], "did you mean 'epochs'?"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(arguments, said, tmp_path):
    """Status 2, no traceback, nothing written."""
    done = tune(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_every_problem_is_told_at_once_before_anything_is_loaded(checkpoint, tmp_path):
    """Keys, nested keys, types and missing paths, with the weights unreadable: they are not even opened."""
    broken = tmp_path / "model"
    broken.mkdir()
    for file in checkpoint.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    keys = ["max_seq_len=lots", "optimizer.learning_rate=1", "lr_scheduler.nam=linear", "dtype=bf17"]
    done = tune("run", "full_finetune", f"model_checkpoint={broken}", f"dataset={ROWS}", *keys, cwd=tmp_path)
    assert done.returncode == 2
    for said in ("max_seq_len", "did you mean 'lr'?", "did you mean 'lr_scheduler.name'?", "did you mean 'bf16'?"):
        assert said in done.stderr
    assert "4 problems, nothing was loaded." in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_missing_paths_are_told_together(tmp_path):
    """Checkpoint and data, each with what is near."""
    (tmp_path / "chats.jsonl").touch()
    keys = ("model_checkpoint=./modle", "dataset=chat.jsonl")
    done = tune("run", "full_finetune", *keys, cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean 'chats.jsonl'?" in done.stderr
    assert "there is no such folder or file" in done.stderr


def test_case_c006_a_broken_line_is_told_by_file_and_line(checkpoint, tmp_path):
    """Refused before weights are read and with nothing written."""
    data = ROWS.parent / "C006a.jsonl"
    done = tune("run", "full_finetune", f"model_checkpoint={checkpoint}", f"dataset={data}", cwd=tmp_path)
    assert done.returncode == 1
    assert "C006a.jsonl:3" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_copied_recipe_runs_from_where_it_is(checkpoint, tmp_path):
    """`tune cp`, then `tune run FILE.py`, also from another folder and by an absolute path."""
    assert tune("cp", "full_finetune", "mine", cwd=tmp_path).returncode == 0
    assert tune("cp", "full_finetune", "mine", "-n", cwd=tmp_path).returncode == 0
    assert tune("cp", "full_finetune", "sub/mine.py", cwd=tmp_path).returncode == 2
    keys = (f"model_checkpoint={checkpoint}", f"dataset={ROWS}", "max_steps=1", "save_last=false")
    for index, path in enumerate(("mine.py", "./mine.py", tmp_path / "mine.py")):
        done = tune("run", path, *keys, f"output_dir=out{index}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr


def test_a_copied_config_runs_from_where_it_is(checkpoint, tmp_path):
    """`tune cp`, change it, `tune run --config FILE`; the command line wins over it."""
    assert tune("cp", "full_finetune.yaml", ".", cwd=tmp_path).returncode == 0
    keys = (f"model_checkpoint={checkpoint}", f"dataset={ROWS}", "max_steps=1", "output_dir=out", "save_last=false")
    done = tune("run", "full_finetune", "--config", "full_finetune.yaml", *keys, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "metrics.jsonl").read_text().count("\n") == 1


def test_help_lists_every_key():
    """Type, default and one line for each, read off the dataclass."""
    import dataclasses

    from torchtune.recipes.full_finetune import FullFinetuneParams

    done = tune("run", "full_finetune", "--help")
    assert done.returncode == 0
    for field in dataclasses.fields(FullFinetuneParams):
        assert f"  {field.name}  (" in done.stdout


def test_case_c018_an_ascii_terminal_is_no_error(checkpoint, tmp_path):
    """UTF-8 is read whatever the locale, and nothing printed raises."""
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    cases = ROWS.parent
    keys = (f"model_checkpoint={checkpoint}", f"dataset={cases / 'C018.jsonl'}", "output_dir=Überblick", "max_steps=1")
    done = tune("run", "full_finetune", *keys, cwd=tmp_path, env={**os.environ, **plain})
    assert done.returncode == 0, done.stderr


def test_every_shipped_config_names_its_recipe_and_validates(checkpoint):
    """A config that ships is one that runs."""
    assert configs()
    for name, config in configs().items():
        assert config.recipe in recipes()
        keys = (f"model_checkpoint={checkpoint}", f"dataset={ROWS}")
        done = tune("validate", name, *keys)
        assert done.returncode == 0, (name, done.stderr)


def test_former_names_lead_to_recipes():
    """What the first library's users type is answered with a recipe that exists."""
    assert set(FORMER_NAMES.values()) <= set(recipes())
