"""quantize and qat by the command line: what they write is read by transformers and here, with the same logits."""

import json
import shutil
import sys

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BitsAndBytesConfig, MixtralConfig
from transformers.models.auto import AutoModelForCausalLM

from tests.models.oracle import HEADS, SIZES
from tests.recipes.conftest import ROWS, metrics_of
from tests.recipes.lora_runs import assert_same_logits, last_step, logits_of, lora, transformers_model
from tests.recipes.many_ranks import train
from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_config
from torchtune.cli.tune import run
from torchtune.quantization.schemes import KINDS, scheme_of
from torchtune.recipes.adapted import AdaptedCheckpoint

pytestmark = pytest.mark.usefixtures("one_thread")
BITS = {"int4": 4.3, "nf4": 4.2}


@pytest.fixture(scope="module", params=[False, True], ids=["tied", "head"])
def base(request, tmp_path_factory):
    """A Llama whose rows groups of 64 divide, with a head of its own or without."""
    config = tiny_config(hidden_size=128, intermediate_size=192, tie_word_embeddings=not request.param)
    return save_tiny_checkpoint(tmp_path_factory.mktemp("base") / "llama", config)


def quantize(base, out, *keys):
    """`tune run quantize`; the folder."""
    assert run(["run", "quantize", f"model_checkpoint={base}", f"output_dir={out}", *keys]) == 0
    return out


def ours(folder, dtype=torch.float32):
    """Our model of a folder, as evaluate and generate read it."""
    return AdaptedCheckpoint.open(str(folder)).load(dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_folder_with_our_logits(base, tmp_path, kind):
    """Within 1e-5 of the largest in float32; and it is another model than the dense one, by the kind's error."""
    folder = quantize(base, tmp_path / "out", f"kind={kind}")
    theirs = logits_of(transformers_model(folder))
    # bitsandbytes multiplies in bf16 on CPUs that are fast at it, whatever it is told; the next test has its weights.
    # Inputs that lie between two steps fall to either by the last bit of what came before; see the layers' own test.
    share = 0.03 if kind == "nf4" else 0.02 if kind.endswith("_dynamic") else 1e-5
    assert_same_logits(logits_of(ours(folder)), theirs, share=share)
    dense = logits_of(ours(base))
    error = (theirs - dense).norm() / dense.norm()
    assert 1e-4 < error < 0.5
    assert AutoTokenizer.from_pretrained(folder).chat_template == AutoTokenizer.from_pretrained(base).chat_template


@pytest.mark.parametrize("kind", ["int8_dynamic", "fp8_dynamic"])
def test_layers_round_the_same_input_alike(base, tmp_path, kind):
    """Every layer by itself, within 1e-5 of the largest output."""
    folder = quantize(base, tmp_path / "out", f"kind={kind}")
    theirs, model = transformers_model(folder), ours(folder)
    logits_of(theirs)  # its first forward unpacks the layers
    layers = [(name, layer) for name, layer in theirs.named_modules() if "_proj" in name.rpartition(".")[2]]
    assert len(layers) == 14
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, layer in layers:
            own = model.get_submodule(name)
            x = torch.randn(2, 9, own.in_features, generator=generator)
            assert_same_logits(own(x), layer(x), share=1e-5)
            assert not torch.allclose(own(x), torch.nn.functional.linear(x, own.weight), rtol=1e-4)


@pytest.mark.parametrize("double", [True, False])
def test_weights_in_nf4_are_those_that_bitsandbytes_reads(base, tmp_path, double):
    """To the bit."""
    folder = quantize(base, tmp_path / "out", "kind=nf4", f"double_quantization={str(double).lower()}")
    theirs, model = transformers_model(folder), ours(folder)
    for name, parameter in theirs.named_parameters():
        if "_proj." in name:
            dense = bitsandbytes.functional.dequantize_4bit(parameter.data, parameter.quant_state)
            assert torch.equal(dense, model.get_parameter(name)), name


@pytest.mark.parametrize("double", [True, False])
def test_what_transformers_quantised_to_nf4_is_read_too(base, tmp_path, double):
    """Its own folder, by bitsandbytes, has the weights that we make of the same base."""
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=asked, dtype=torch.float32)
    model.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "theirs")
    mine = quantize(base, tmp_path / "mine", "kind=nf4", f"double_quantization={str(double).lower()}")
    found, expected = ours(tmp_path / "theirs").state_dict(), ours(mine).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_only_layers_of_the_blocks_are_quantised(base, tmp_path, kind):
    """The rest is there to the byte; what is quantised takes the bits that the documents say."""
    folder = quantize(base, tmp_path / "out", f"kind={kind}")
    before, after = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    dense = {name for name in before if "_proj." not in name}
    assert all(torch.equal(after[name], before[name]) for name in dense)
    assert not any(name in after and after[name].dtype == torch.float32 for name in before.keys() - dense)
    num_weights = sum(before[name].numel() for name in before.keys() - dense)
    num_bits = 8 * sum(tensor.nbytes for name, tensor in after.items() if name not in dense)
    if kind != "nf4":  # whose tables, the same for each layer, weigh on layers as small as these
        assert num_bits / num_weights < BITS.get(kind, 8.2) + 0.03
    assert "lm_head" in str(json.loads((folder / "config.json").read_text())["quantization_config"])


def test_weights_are_those_of_the_scheme(base, tmp_path):
    """What is read back is what `rounded` makes of the stored weight, to the bit."""
    folder = quantize(base, tmp_path / "out", "kind=int4", "group_size=32")
    model = ours(folder)
    for name, stored in load_file(base / "model.safetensors").items():
        expected = scheme_of("int4", group_size=32).rounded(stored) if "_proj." in name else stored
        if not (name == "lm_head.weight" and model.is_tied):
            assert torch.equal(model.get_parameter(name), expected), name


def test_bf16_too(tmp_path):
    """A checkpoint in bf16, computed in bf16 by both: weights are the same to the bit."""
    config = tiny_config(hidden_size=128, intermediate_size=192)
    base = save_tiny_checkpoint(tmp_path / "base", config, dtype=torch.bfloat16)
    for kind in ("int4", "int8", "fp8"):
        folder = quantize(base, tmp_path / kind, f"kind={kind}")
        # A reader that computes in bf16 rounds after each product, in another order than ours.
        assert_same_logits(
            logits_of(ours(folder, torch.bfloat16)).float(),
            logits_of(transformers_model(folder, torch.bfloat16)).float(),
            share=0.03,
        )


def test_the_head_too_where_asked_for(tmp_path, capsys):
    """Not where it is the embedding."""
    config = tiny_config(hidden_size=128, intermediate_size=192, tie_word_embeddings=False)
    base = save_tiny_checkpoint(tmp_path / "base", config)
    folder = quantize(base, tmp_path / "out", "kind=int8", "quantize_head=true")
    assert "lm_head.weight_packed" in load_file(folder / "model.safetensors")
    assert_same_logits(logits_of(ours(folder)), logits_of(transformers_model(folder)))
    tied = save_tiny_checkpoint(tmp_path / "tied")
    keys = [f"model_checkpoint={tied}", f"output_dir={tmp_path / 'no'}", "kind=int8", "quantize_head=true"]
    assert run(["run", "quantize", *keys]) == 2
    assert "quantize_head: the head is the embedding" in capsys.readouterr().err


def test_adapters_are_merged_first(base, tmp_path):
    """The quantised merged model is the merged model quantised."""
    lora(base, tmp_path / "run", "save_merged=true")
    step = last_step(tmp_path / "run")
    one = tmp_path / "one"
    assert run(["run", "quantize", f"adapter={step}", f"output_dir={one}", "kind=int8"]) == 0
    two = quantize(step / "merged", tmp_path / "two", "kind=int8")
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_the_loss_is_told_before_and_after(base, tmp_path, capsys):
    """And evaluate and generate read the folder."""
    folder = quantize(base, tmp_path / "out", "kind=int8", f"dataset={ROWS}", "dtype=fp32")
    said = capsys.readouterr().err
    before, after = (float(word) for word in said.partition("loss ")[2].replace(" before,", "").split()[:2])
    assert abs(after - before) < 0.005 * before
    keys = [f"model_checkpoint={folder}", "dtype=fp32"]
    assert run(["run", "evaluate", *keys, f"dataset={ROWS}", f"output={tmp_path / 'found.json'}"]) == 0
    assert json.loads((tmp_path / "found.json").read_text())["dataset"]["loss"] == pytest.approx(after, abs=1e-4)
    assert run(["run", "generate", *keys, "prompt=What?", "max_new_tokens=4"]) == 0


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["kind=int5"], "did you mean 'int"),
        (["kind=nf4", "group_size=64"], "nf4 has no groups"),
        (["kind=int4", "group_size=48"], "q_proj has rows of 128, which groups of 48 don't divide"),
        (["kind=int4", "group_size=48"], "group_size=64 divides all"),
    ],
)
def test_what_can_not_be_is_refused_before_weights_load(base, tmp_path, capsys, keys, said):
    """By `validate` and by the run, which leaves nothing behind."""
    everything = [f"model_checkpoint={base}", f"output_dir={tmp_path / 'out'}", *keys]
    assert run(["validate", "quantize", *everything]) == 2
    assert said in capsys.readouterr().err
    assert run(["run", "quantize", *everything]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_quantised_folder_is_trained_on_as_a_dense_one(base, tmp_path):
    """What is written has its types, and says nothing of a quantisation."""
    once = quantize(base, tmp_path / "once", "kind=int8")
    assert run(["run", "full_finetune", *qat_keys(once, tmp_path / "run", "optimizer.lr=0.0", "max_steps=1")]) == 0
    step = last_step(tmp_path / "run")
    assert "quantization_config" not in json.loads((step / "config.json").read_text())
    assert_same_logits(logits_of(transformers_model(step)), logits_of(ours(once)))


@pytest.mark.parametrize(("kind", "package"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_an_absent_library_is_named_before_weights_load(base, tmp_path, capsys, monkeypatch, kind, package):
    """With the extra that installs it."""
    monkeypatch.setitem(sys.modules, package, None)
    for module in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, module)
    keys = [f"model_checkpoint={base}", f"output_dir={tmp_path / 'out'}", f"kind={kind}"]
    assert run(["run", "quantize", *keys]) != 0
    said = capsys.readouterr().err
    assert f"kind={kind}" in said
    assert package in said
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_is_missing_is_named(base, tmp_path, capsys):
    """By the tensor that it belongs to."""
    folder = quantize(base, tmp_path / "out", "kind=int4")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_packed"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert run(["run", "evaluate", f"model_checkpoint={folder}", f"dataset={ROWS}"]) != 0
    assert "model.layers.1.mlp.up_proj.weight_packed" in capsys.readouterr().err


def test_mixtures_and_quantised_ones_are_refused(base, tmp_path, capsys):
    """Each by the reason."""
    sizes = SIZES | HEADS | {"vocab_size": 400, "num_hidden_layers": 1, "num_local_experts": 3}
    mixture = save_tiny_checkpoint(tmp_path / "mixture", MixtralConfig(**sizes))
    assert run(["run", "quantize", f"model_checkpoint={mixture}", f"output_dir={tmp_path / 'no'}", "kind=int8"]) != 0
    assert "it has experts" in capsys.readouterr().err
    once = quantize(base, tmp_path / "once", "kind=int8")
    assert run(["run", "quantize", f"model_checkpoint={once}", f"output_dir={tmp_path / 'no'}", "kind=int8"]) == 2
    assert "is quantised already" in capsys.readouterr().err


def qat_keys(base, out, *keys):
    """A small run with rounding."""
    sizes = ("max_seq_len=512", "batch_size=3", "gradient_accumulation_steps=1", "max_steps=3", "optimizer.lr=0.001")
    return [f"model_checkpoint={base}", f"dataset={ROWS}", f"output_dir={out}", "dtype=fp32", *sizes, *keys]


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_what_was_trained_rounded_is_converted(base, tmp_path, kind):
    """`quantized/` is what quantize makes of the checkpoint, to the byte, and transformers' logits are the run's own."""
    assert run(["run", "full_finetune", *qat_keys(base, tmp_path / "run", f"qat={kind}")]) == 0
    step = last_step(tmp_path / "run")
    found = step / "quantized"
    folder = quantize(step, tmp_path / "out", f"kind={kind}")
    assert (found / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert json.loads((found / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    assert_same_logits(logits_of(ours(found)), logits_of(transformers_model(found)))


def test_qat_under_its_old_name_and_what_does_not_go_with_it(base, tmp_path, capsys):
    """int4 by default; each pair by name, a group size that does not fit before weights load."""
    assert run(["run", "qat_finetune", *qat_keys(base, tmp_path / "run", "max_steps=1")]) == 0
    assert (last_step(tmp_path / "run") / "quantized" / "model.safetensors").exists()
    for keys, said in (
        (["qat=int4", "tensor_parallel=2"], "tensor_parallel: with qat"),
        (["qat=int4", "compile=true"], "compile: "),
        (["qat_group_size=32"], "qat_group_size: nothing is rounded"),
        (["qat=int4", "qat_group_size=48"], "qat_group_size: model.layers.0.self_attn.q_proj has rows of 128"),
    ):
        assert run(["validate", "full_finetune", *qat_keys(base, tmp_path / "other", *keys)]) == 2
        assert said in capsys.readouterr().err


def test_a_rounded_run_goes_on_to_the_same_bits(base, tmp_path):
    """From its checkpoint in the middle."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    keys = ("qat=int4", "max_steps=4", "save_every_n_steps=2", "keep_last=null")
    assert run(["run", "full_finetune", *qat_keys(base, whole, *keys)]) == 0
    shutil.copytree(whole, out, symlinks=True)
    shutil.rmtree(out / "step_4")
    assert run(["run", "full_finetune", *qat_keys(base, out, *keys, "resume_from_checkpoint=true")]) == 0
    for name in ("model.safetensors", "quantized/model.safetensors"):
        assert (out / "step_4" / name).read_bytes() == (whole / "step_4" / name).read_bytes()


@pytest.mark.parametrize("recipe", ["full_finetune", "lora_finetune"])
def test_what_plain_rounding_loses_is_told_and_logged(base, tmp_path, capsys, recipe):
    """Before the first step, of the base: as evaluate has it, and after quantize; at the end, of what was trained."""
    keys = [*qat_keys(base, tmp_path / "run", "qat=int4", f"eval_dataset={ROWS}"), "max_steps=1", "packed=false"]
    assert run(["run", recipe, *keys]) == 0
    said = capsys.readouterr().err
    rounded = quantize(base, tmp_path / "rounded", "kind=int4")
    losses = []
    for folder in (base, rounded, last_step(tmp_path / "run") / "quantized"):
        found = tmp_path / "found.json"
        assert (
            run(["run", "evaluate", f"model_checkpoint={folder}", f"dataset={ROWS}", "dtype=fp32", f"output={found}"])
            == 0
        )
        losses.append(pytest.approx(json.loads(found.read_text())["dataset"]["loss"], rel=1e-5))
    first, last = metrics_of(tmp_path / "run")
    assert [first["step"], first["eval_loss_not_rounded"], first["eval_loss"], last["eval_loss"]] == [0, *losses]
    assert f"held-out loss {first['eval_loss_not_rounded']:.4f} before training" in said


def test_a_rounded_run_on_two_ranks(base, tmp_path, two_ranks):
    """Its losses are one rank's, but for codes that a last bit turns; its quantised model is what quantize makes."""
    keys = ("qat=int4", "packed=false", "optimizer=torch.optim.SGD", "optimizer.lr=0.01")
    alone, out = tmp_path / "alone", tmp_path / "out"
    train("full_finetune", qat_keys(base, alone, *keys, "batch_size=4"))
    two_ranks.run(train, "full_finetune", qat_keys(base, out, *keys, "batch_size=2"), timeout_s=200)
    for line, other in zip(metrics_of(alone), metrics_of(out), strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-3)
    assert metrics_of(out)[0]["loss"] == pytest.approx(metrics_of(alone)[0]["loss"], rel=1e-5)
    step = last_step(out)
    folder = quantize(step, tmp_path / "quantized", "kind=int4")
    found = load_file(step / "quantized" / "model.safetensors")
    expected = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
