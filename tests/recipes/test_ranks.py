"""Several ranks on the CPU: the same numbers, and errors that end all of them."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.auto import AutoModelForCausalLM

from tests.recipes.conftest import ROWS, metrics_of
from tests.recipes.test_kill_and_resume import finish
from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_config

SGD = ("optimizer=torch.optim.SGD", "optimizer.lr=0.1")


def command(checkpoint, out, *more, ranks=1):
    launch = ("--nproc_per_node", str(ranks)) if ranks > 1 else ()
    return [
        *(
            sys.executable,
            "-m",
            "torchtune.cli.tune",
            "run",
            *launch,
            "full_finetune",
            f"model_checkpoint={checkpoint}",
        ),
        *(f"dataset={ROWS}", f"output_dir={out}", "dtype=fp32", "max_seq_len=128", *SGD, *more),
    ]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("packed", ["true", "false"])
def test_two_ranks_equal_one(checkpoint, tmp_path, packed):
    """The same rows in the same steps: losses, norms and held-out losses agree to 1e-5 in fp32 (C049, C107)."""
    one, two = tmp_path / "one", tmp_path / "two"
    keys = (f"packed={packed}", "batch_size=3", "eval_fraction=0.2", "epochs=2")
    for arguments in (
        command(checkpoint, one, *keys, "gradient_accumulation_steps=2"),
        command(checkpoint, two, *keys, "gradient_accumulation_steps=1", ranks=2),
    ):
        done = finish(arguments)
        assert done.returncode == 0, done.stderr
    for line, other in zip(metrics_of(one), metrics_of(two), strict=True):
        assert line["tokens"] == other["tokens"]
        for key in ("loss", "grad_norm", "eval_loss"):
            assert other.get(key) == (pytest.approx(line[key], rel=1e-5) if key in line else None)


@pytest.mark.timeout(180)
def test_two_runs_at_once_do_not_meet(checkpoint, tmp_path):
    """C108: each launch finds a free port."""
    processes = [
        subprocess.Popen(
            command(checkpoint, tmp_path / name, "max_steps=1", ranks=2), stderr=subprocess.PIPE, text=True
        )
        for name in ("a", "b")
    ]
    for process in processes:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr


@pytest.mark.timeout(120)
def test_a_mistake_is_told_once_before_ranks_start(checkpoint, tmp_path):
    """The launcher validates first."""
    done = finish(command(checkpoint, tmp_path / "out", "epoch=3", ranks=2))
    assert done.returncode == 2
    assert done.stderr.count("did you mean 'epochs'?") == 1


FAILING_RECIPE = """
import resource
from torchtune.distributed.process_group import rank
from torchtune.recipes import full_finetune
from torchtune.recipes.full_finetune import FullFinetuneParams, FullFinetuneRecipe, check


class Failing(FullFinetuneRecipe):
    def _setup_observers(self, params):
        super()._setup_observers(params)
        keep_up = self._upkeep.after_step

        def after_step(epoch, metrics):
            if self.total_training_steps == 1:
                {failure}
            return keep_up(epoch, metrics)

        self._upkeep.after_step = after_step


def main():
    full_finetune.FullFinetuneRecipe = Failing
    full_finetune.main()
"""
RAISES = "if rank() == 1: raise RuntimeError('rank one broke')"
FULL_DISK = "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("failure", "said"), [(RAISES, "rank one broke"), (FULL_DISK, "File too large")], ids=["raises", "full-disk"]
)
def test_case_c106_a_failing_rank_ends_all(checkpoint, tmp_path, failure, said):
    """In far under a minute, the failing rank's message first; the checkpoint of the step before stands."""
    recipe = tmp_path / "failing.py"
    recipe.write_text(FAILING_RECIPE.format(failure=failure))
    arguments = command(checkpoint, tmp_path / "out", "save_every_n_steps=1", ranks=2)
    done = finish([str(recipe) if argument == "full_finetune" else argument for argument in arguments])
    assert done.returncode == 1, done.stderr
    assert said in done.stderr
    others = done.stderr.find("Connection closed")
    assert others == -1 or done.stderr.index(said) < others
    assert [folder.name for folder in (tmp_path / "out").glob("step_*")] == ["step_1"]
    assert not list((tmp_path / "out").glob(".step_*"))


@pytest.mark.timeout(120)
def test_a_bad_row_is_told_once(checkpoint, tmp_path):
    """Every rank reads it; one of them says so."""
    arguments = command(checkpoint, tmp_path / "out", ranks=2)
    done = finish([a.replace(str(ROWS), str(ROWS.parent / "C006a.jsonl")) for a in arguments])
    assert done.returncode == 1
    assert done.stderr.count("C006a.jsonl:3") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_case_c058_c061_two_ranks_save_what_the_source_held(tmp_path, dtype):
    """Names, dtypes and the tied head of the base, and the logits that transformers computes from them."""
    source = save_tiny_checkpoint(tmp_path / "source", dtype=dtype)
    out = tmp_path / "out"
    done = finish(command(source, out, "max_steps=2", ranks=2))
    assert done.returncode == 0, done.stderr
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out / "step_2"))
    assert {name: tensor.dtype for name, tensor in after.items()} == {n: t.dtype for n, t in before.items()}
    model, info = AutoModelForCausalLM.from_pretrained(out / "step_2", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.timeout(120)
def test_case_c086_a_rank_without_a_trained_token_is_no_error(tmp_path):
    """One row for two ranks: the head of the other, which is not tied, gets no gradient there, and none is missed."""
    source = save_tiny_checkpoint(tmp_path / "source", tiny_config(tie_word_embeddings=False))
    row = tmp_path / "one.jsonl"
    row.write_text(ROWS.read_text().partition("\n")[0])
    done = finish([a.replace(str(ROWS), str(row)) for a in command(source, tmp_path / "out", "max_steps=1", ranks=2)])
    assert done.returncode == 0, done.stderr
