"""lora_finetune with qat by the command line: what it writes, what it goes on to, and what does not go with it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.recipes.conftest import ROWS, metrics_of
from tests.recipes.lora_runs import (
    SGD,
    assert_same_logits,
    keys_of,
    last_step,
    logits_of,
    lora,
    lora_recipe,
    transformers_model,
)
from tests.recipes.many_ranks import train
from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_config
from torchtune.cli.tune import run
from torchtune.recipes.adapted import AdaptedCheckpoint

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = tiny_config(hidden_size=128, intermediate_size=192)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama whose rows groups of 64 divide."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("base") / "llama", CONFIG)


def quantize(out, *keys):
    """`tune run quantize`; the tensors of its folder."""
    assert run(["run", "quantize", f"output_dir={out}", *keys]) == 0
    return load_file(out / "model.safetensors")


def assert_equal(found, expected):
    """To the bit, tensor by tensor."""
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("keys", [("qat=int4", "lora_targets=attention"), ("qat=int8", "qat_group_size=32")])
def test_what_is_written_is_the_merged_model_quantised(base, tmp_path, keys):
    """As `quantize` makes it of the adapter, and of the merged folder; transformers reads it with the same logits."""
    lora(base, tmp_path / "run", *keys, "save_merged=true", "optimizer.lr=0.01")
    step = last_step(tmp_path / "run")
    found = load_file(step / "quantized" / "model.safetensors")
    kind = [keys[0].replace("qat", "kind"), *(key.removeprefix("qat_") for key in keys[1:] if key.startswith("qat_"))]
    assert_equal(found, quantize(tmp_path / "one", f"adapter={step}", *kind))
    assert_equal(found, quantize(tmp_path / "two", f"model_checkpoint={step / 'merged'}", *kind))
    said, expected = (
        json.loads((folder / "config.json").read_text()) for folder in (step / "quantized", tmp_path / "two")
    )
    assert said == expected
    model = AdaptedCheckpoint.open(str(step / "quantized")).load(dtype=torch.float32)
    assert_same_logits(logits_of(model), logits_of(transformers_model(step / "quantized")))


def test_the_run_computes_what_is_written_in_bf16_too(tmp_path):
    """To the bit: over a base in bf16, a frozen adapter and layers without an update, nothing is rounded before."""
    base = save_tiny_checkpoint(tmp_path / "base", CONFIG, dtype=torch.bfloat16)
    lora(base, tmp_path / "first", "optimizer.lr=0.01")
    frozen = f"frozen_adapters=[{last_step(tmp_path / 'first')}]"
    keys = ("qat=int4", "lora_targets=attention", "dtype=bf16", "optimizer.lr=0.01", frozen)
    recipe = lora_recipe(base, tmp_path / "run", *keys)
    written = AdaptedCheckpoint.open(str(last_step(tmp_path / "run") / "quantized")).load(dtype=torch.bfloat16)
    with recipe._autocast:
        assert torch.equal(logits_of(recipe._model.eval()), logits_of(written))


def test_a_run_that_goes_on_writes_the_same_bits(base, tmp_path):
    """From its checkpoint in the middle."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    keys = ("qat=int4", "max_steps=4", "save_every_n_steps=2", "keep_last=null")
    lora(base, whole, *keys)
    shutil.copytree(whole, out, symlinks=True)
    shutil.rmtree(out / "step_4")
    lora(base, out, *keys, "resume_from_checkpoint=true")
    for name in ("adapter_model.safetensors", "quantized/model.safetensors"):
        assert (out / "step_4" / name).read_bytes() == (whole / "step_4" / name).read_bytes()


@pytest.mark.parametrize(
    "ranks", [("batch_size=2",), ("batch_size=4", "context_parallel=2", "enable_activation_checkpointing=true")]
)
def test_two_ranks(base, tmp_path, two_ranks, ranks):
    """Losses are one rank's, but for codes that a last bit turns; what is written is what quantize makes of the adapter."""
    keys = ("qat=int4", "packed=false", *SGD, "optimizer.lr=0.01")
    alone, out = tmp_path / "alone", tmp_path / "out"
    train("lora_finetune", keys_of(base, alone, *keys, "batch_size=4"))
    two_ranks.run(train, "lora_finetune", keys_of(base, out, *keys, *ranks), timeout_s=200)
    for line, other in zip(metrics_of(alone), metrics_of(out), strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-3)
    assert metrics_of(out)[0]["loss"] == pytest.approx(metrics_of(alone)[0]["loss"], rel=1e-5)
    step = last_step(out)
    found = load_file(step / "quantized" / "model.safetensors")
    assert_equal(found, quantize(tmp_path / "quantized", f"adapter={step}", "kind=int4"))


def test_two_ranks_round_what_one_rounds_in_bf16(base, tmp_path, two_ranks):
    """The loss of the first step: FSDP casts no weight to bf16 on the way to its rounding."""
    for recipe in ("lora_finetune", "full_finetune"):
        keys = ("qat=int4", "packed=false", "max_steps=1", "dtype=bf16", "save_last=false")
        both = []
        for name, more in (("alone", "batch_size=4"), ("out", "batch_size=2")):
            given = [key for key in keys_of(base, tmp_path / recipe / name, *keys, more) if not key.startswith("lora_")]
            both.append((tmp_path / recipe / name, given))
        (alone, keys_alone), (out, keys_out) = both
        train(recipe, keys_alone)
        two_ranks.run(train, recipe, keys_out, timeout_s=200)
        # Sums of bf16 products go another way; the same weights cast before they are rounded are 1e-3 off.
        assert metrics_of(out)[0]["loss"] == pytest.approx(metrics_of(alone)[0]["loss"], rel=1e-4)


def test_qat_lora_under_its_old_name_and_what_does_not_go_with_it(base, tmp_path, capsys):
    """int4 by default; each pair by name, before weights load."""
    assert run(["run", "qat_lora_finetune", *keys_of(base, tmp_path / "run", "max_steps=1")]) == 0
    assert (last_step(tmp_path / "run") / "quantized" / "model.safetensors").exists()
    for keys, said in (
        (["base_quantization=nf4"], "base_quantization: with qat"),
        (["use_dora=true"], "use_dora: with qat"),
        (["lora_dropout=0.1"], "lora_dropout: with qat"),
        (["lora_init=pissa"], "lora_init: 'pissa' splits"),
        (["tensor_parallel=2"], "tensor_parallel: with qat"),
        (["compile=true"], "compile: "),
        (["qat_group_size=48"], "qat_group_size: model.layers.0.self_attn.q_proj has rows of 128"),
    ):
        assert run(["validate", "lora_finetune", *keys_of(base, tmp_path / "other", "qat=int4", *keys)]) == 2
        assert said in capsys.readouterr().err
    lora(base, tmp_path / "dora", "use_dora=true", "max_steps=1")
    keys = [f"adapter={last_step(tmp_path / 'dora')}", f"dataset={ROWS}", "qat=int4"]
    assert run(["validate", "lora_finetune", f"model_checkpoint={base}", *keys]) == 2
    assert "has DoRA" in capsys.readouterr().err
