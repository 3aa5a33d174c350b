"""lora_finetune over a quantised base of which each rank has a share: one device's numbers, and its checkpoints."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.recipes.many_ranks import same_tensors, train
from tests.recipes.test_many_ranks import keys_of
from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_config
from torchtune.recipes.adapters import tell_kept_whole

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(240)]

NF4 = ("base_quantization=nf4", "double_quantization=false", "save_merged=true", "lora_rank=4")
INT8 = ("base_quantization=int8", "use_dora=true", "save_merged=true", "lora_rank=4", "lora_init=gaussian")
# At 0.1 DoRA's steps are so long that the last bits of the first are the fifth digit of the tenth.
INT8 += ("optimizer.lr=0.02",)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny Llama."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("source") / "tiny", tiny_config())


def trained(recipe_keys):
    return train("lora_finetune", recipe_keys)


def same_run(one, other, *, step=10):
    """Metrics, adapter and merged model agree within 1e-5."""
    (lines, folder), (other_lines, other_folder) = one, other
    assert len(lines) == len(other_lines)
    for line, other_line in zip(lines, other_lines, strict=True):
        for key in ("loss", "grad_norm", "eval_loss"):
            assert other_line.get(key) == (pytest.approx(line[key], rel=1e-5) if key in line else None), key
    for name in ("adapter_model.safetensors", "merged/model.safetensors"):
        same_tensors(
            load_file(folder / f"step_{step}" / name), load_file(other_folder / f"step_{step}" / name), atol=1e-5
        )


@pytest.mark.parametrize("keys", [NF4, INT8], ids=["nf4", "int8-dora"])
def test_a_shared_base_is_that_of_one_device(source, tmp_path, two_ranks, keys):
    """Losses, norms, the held-out loss, the adapter, and what it is merged into."""
    alone = trained(keys_of(source, tmp_path / "alone", *keys))
    shared, _ = two_ranks.run(trained, keys_of(source, tmp_path / "shared", *keys, data_ranks=2), timeout_s=200)
    same_run((alone[0], tmp_path / "alone"), (shared[0], tmp_path / "shared"))


def test_a_run_goes_on_over_a_shared_base(source, tmp_path, two_ranks):
    """To the same bits on as many ranks; on one device, to the same numbers."""
    whole, out, alone = (tmp_path / name for name in ("whole", "out", "alone"))
    keys = (*NF4, "save_every_n_steps=5", "keep_last=null")
    lines = two_ranks.run(trained, keys_of(source, whole, *keys, data_ranks=2), timeout_s=200)[0][0]
    for folder in (out, alone):
        shutil.copytree(whole, folder, symlinks=True)
        shutil.rmtree(folder / "step_10")
    again = (*keys, "resume_from_checkpoint=true")
    resumed = two_ranks.run(trained, keys_of(source, out, *again, data_ranks=2), timeout_s=200)[0][0]
    same_run((lines, whole), (resumed, out))
    for name in ("adapter_model.safetensors", "merged/model.safetensors"):
        before, after = load_file(whole / "step_10" / name), load_file(out / "step_10" / name)
        assert all(torch.equal(before[key], after[key]) for key in before)
    same_run((lines, whole), (trained(keys_of(source, alone, *again))[0], alone))


def test_what_is_whole_on_each_rank_is_told(capsys):
    """How many, and one by its name."""
    tell_kept_whole(["model.layers.0.mlp.experts.down_proj"], 14)
    assert "1 of 14 quantised weights can't be shared out" in (told := capsys.readouterr().err)
    assert "'model.layers.0.mlp.experts.down_proj'" in told
    tell_kept_whole([], 14)
    assert not capsys.readouterr().err
