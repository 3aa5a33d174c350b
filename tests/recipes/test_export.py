"""export by the command line: what it writes is the base with its adapters, by PEFT and by float64."""

import json
import shutil

import pytest
import torch
from gguf import GGMLQuantizationType
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MixtralConfig

from tests.checkpoint.test_gguf import tiny_file
from tests.models.oracle import HEADS, SIZES
from tests.recipes.lora_runs import (
    assert_same_logits,
    edited,
    export,
    last_step,
    logits_of,
    lora,
    lora_recipe,
    peft_model,
    transformers_model,
)
from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_config
from torchtune.checkpoint.load import load_model
from torchtune.checkpoint.open import open_checkpoint
from torchtune.cli.tune import run
from torchtune.quantization.kinds import packer

pytestmark = pytest.mark.usefixtures("one_thread")
NF4 = "base_quantization=nf4"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
# The largest error of one rounding, as a share of the value.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}


@pytest.fixture(scope="module")
def runs(checkpoint, tmp_path_factory):
    """The last checkpoint of a run, by its keys; each is run once."""
    made = {}

    def run_once(*keys, base=checkpoint):
        if keys not in made:
            out = tmp_path_factory.mktemp("run") / "out"
            lora(base, out, "save_merged=true", *keys)
            made[keys] = last_step(out)
        return made[keys]

    return run_once


def weights(folder):
    """All tensors of a folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def merged_by_hand(base, adapter, *, start=lambda weight: weight):
    """W + scale * B A in float64, by the names of the files; `start` makes of a stored matrix what it is added to."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    tensors, found = weights(adapter), {}
    for name, weight in weights(base).items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        found[name] = weight.double()
        if f"{prefix}.lora_A.weight" in tensors:
            a, b = (tensors[f"{prefix}.lora_{part}.weight"].double() for part in "AB")
            found[name] = start(weight).double() + scale * b @ a
    return found


def assert_rounded(found, expected, dtype):
    """One rounding to `dtype`, after a sum in float32 of values that may cancel."""
    assert found.dtype == dtype
    allowed = ROUNDING[dtype] * expected.abs() * 1.001 + 8 * ROUNDING[torch.float32] * expected.abs().max()
    assert ((found.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_the_sum_rounded_once(checkpoint, runs, tmp_path, dtype):
    """Of W + scale * B A in float64, in each type."""
    adapter, kind = runs(), DTYPES[dtype]
    folder = export(tmp_path / "out", f"adapter={adapter}", f"dtype={dtype}")
    found, expected = weights(folder), merged_by_hand(checkpoint, adapter)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert_rounded(tensor, expected[name], kind)
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(kind).removeprefix("torch.")
    loaded = transformers_model(folder, kind)
    assert logits_of(loaded).isfinite().all()
    assert (
        AutoTokenizer.from_pretrained(folder).chat_template == AutoTokenizer.from_pretrained(checkpoint).chat_template
    )


KINDS = [
    (),
    ("use_dora=true", "use_rslora=true", "lora_rank_pattern={o_proj: 2}"),
    ("modules_to_save=[lm_head, norm]",),
    ("lora_init=pissa",),
    ("param_dtype=bf16",),
    (NF4,),
    (NF4, "double_quantization=false", "use_dora=true"),
    (NF4, "lora_init=pissa"),
    (NF4, "lora_init=loftq"),
    ("base_quantization=int8", "modules_to_save=[lm_head]"),
    ("new_tokens=[<think>]", "pad_vocab_to_multiple_of=8"),
]


@pytest.mark.parametrize("keys", KINDS, ids=["-".join(key.split("=")[-1] for key in keys) or "plain" for keys in KINDS])
def test_it_is_what_the_run_merged_itself(checkpoint, runs, tmp_path, keys):
    """To the byte, whatever the base rested in; the base is the one that the adapter names."""
    step = runs(*keys)
    folder = export(tmp_path / "out", f"adapter={step}")
    assert (folder / "model.safetensors").read_bytes() == (step / "merged" / "model.safetensors").read_bytes()
    names = {file.name for file in folder.iterdir()} - {"README.md", "loss.svg"}  # the card of the export
    assert names == {file.name for file in (step / "merged").iterdir()}
    assert not any("adapter" in name for name in names)
    for name in names - {"model.safetensors"}:
        assert (folder / name).read_bytes() == (step / "merged" / name).read_bytes()
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {(tmp_path.stat().st_mode | 0o044) & 0o666}


def test_quantised_experts_too(tmp_path):
    """A stack of matrices is packed, and merged, one by one."""
    sizes = SIZES | HEADS | {"vocab_size": 400, "num_hidden_layers": 1, "num_local_experts": 3}
    base = save_tiny_checkpoint(tmp_path / "base", MixtralConfig(**sizes))
    lora(base, tmp_path / "run", NF4, "lora_targets=[experts]", "save_merged=true", "max_steps=1")
    step = last_step(tmp_path / "run")
    folder = export(tmp_path / "out", f"adapter={step}")
    assert (folder / "model.safetensors").read_bytes() == (step / "merged" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("keys", [(), ("use_dora=true",), ("modules_to_save=[lm_head]",), ("lora_init=pissa",)])
def test_logits_are_those_of_the_adapter_in_peft(checkpoint, runs, tmp_path, keys):
    """Within 1e-5 of the largest, in fp32."""
    folder = export(tmp_path / "out", f"model_checkpoint={checkpoint}", f"adapter={runs(*keys)}")
    assert_same_logits(logits_of(transformers_model(folder)), logits_of(peft_model(checkpoint, runs(*keys))))


@pytest.mark.parametrize("kind", ["nf4", "int8", "int4"])
def test_over_a_quantised_base_it_is_what_the_run_computed(checkpoint, tmp_path, kind):
    """The dequantised weights and the update, in float64: logits of the recipe's own model, weights of the library's."""
    recipe = lora_recipe(checkpoint, tmp_path / "run", f"base_quantization={kind}")
    step = last_step(tmp_path / "run")
    folder = export(tmp_path / "out", f"adapter={step}", "dtype=fp64")
    pack = packer(kind)
    expected = merged_by_hand(checkpoint, step, start=lambda weight: pack(weight).dense(torch.float64))
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-15)
    ours = logits_of(recipe._model.eval())
    assert_same_logits(ours, logits_of(transformers_model(folder, torch.float64)).float())
    plain = export(tmp_path / "plain", f"adapter={step}", "base_quantization=none")
    assert_same_logits(logits_of(transformers_model(plain)), logits_of(peft_model(checkpoint, step)))


def test_pissa_over_nf4_is_what_the_run_computed(checkpoint, tmp_path, capsys):
    """What was quantised is the base less the adapter's beginning; a weighted sum has no such base, and says so."""
    recipe = lora_recipe(checkpoint, tmp_path / "run", NF4, "lora_init=pissa")
    step = last_step(tmp_path / "run")
    folder = export(tmp_path / "out", f"adapter={step}")
    assert_same_logits(logits_of(recipe._model.eval()), logits_of(transformers_model(folder)))
    half = export(tmp_path / "sum", f"adapter=[{step}, {step}]", "adapter_weights=[0.25, 0.75]")
    assert "each adapter has a base of its own" in capsys.readouterr().err
    assert_same_logits(logits_of(transformers_model(half)), logits_of(peft_model(checkpoint, step)))


def test_several_are_merged_in_the_order_given(checkpoint, runs, tmp_path):
    """A DoRA adapter over a plain one is another model than the other way round: each as PEFT merges them in turn."""
    plain, dora = runs(), runs("use_dora=true", "use_rslora=true", "lora_rank_pattern={o_proj: 2}")
    found = []
    for name, (first, second) in {"one": (plain, dora), "two": (dora, plain)}.items():
        folder = export(tmp_path / name, f"model_checkpoint={checkpoint}", f"adapter=[{first}, {second}]")
        found.append(logits_of(transformers_model(folder)))
        expected = peft_model(peft_model(checkpoint, first).merge_and_unload(), second)
        assert_same_logits(found[-1], logits_of(expected))
    assert (found[0] - found[1]).abs().max() > 1e-4 * found[0].abs().max()


def test_a_run_over_frozen_adapters_is_told_of_them(checkpoint, runs, tmp_path, capsys):
    """Alone it is merged into the base, and they are named; with them it is what the run merged."""
    below = runs()
    step = runs("use_dora=true", f"frozen_adapters=[{below}]")
    both = export(tmp_path / "both", f"adapter=[{below}, {step}]")
    assert (both / "model.safetensors").read_bytes() == (step / "merged" / "model.safetensors").read_bytes()
    capsys.readouterr()
    export(tmp_path / "alone", f"adapter={step}")
    assert f"trained over other adapters: {below}; name them before it" in capsys.readouterr().err


def test_weights_of_adapters(checkpoint, runs, tmp_path):
    """The weighted sum of the updates, of other ranks and targets: PEFT's `cat`, and the sum of dense matrices."""
    one, two = runs(), runs("lora_rank=6", "lora_targets=attention", "lora_alpha=3", "seed=1")
    keys = (f"model_checkpoint={checkpoint}", f"adapter=[{one}, {two}]", "adapter_weights=[0.25, 2]")
    folder = export(tmp_path / "merged", *keys, "dtype=fp64")
    base, a, b = (weights(checkpoint), merged_by_hand(checkpoint, one), merged_by_hand(checkpoint, two))
    for name, tensor in weights(folder).items():
        expected = base[name] + 0.25 * (a[name] - base[name]) + 2 * (b[name] - base[name])
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-7)
    adapter = export(tmp_path / "adapter", *keys, "merge=false")
    assert {file.name for file in adapter.glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert_same_logits(logits_of(peft_model(checkpoint, adapter)), logits_of(transformers_model(folder)))
    again = export(tmp_path / "again", f"adapter={adapter}")
    assert_same_logits(logits_of(transformers_model(again)), logits_of(transformers_model(folder)))


def test_dora_and_whole_modules_have_no_weighted_sum(checkpoint, runs, tmp_path, capsys):
    """Each by the reason."""
    for keys in (("use_dora=true", "use_rslora=true", "lora_rank_pattern={o_proj: 2}"), ("modules_to_save=[lm_head]",)):
        given = [f"adapter=[{runs()}, {runs(*keys)}]", "adapter_weights=[1, 1]", f"output_dir={tmp_path}/out"]
        assert run(["run", "export", *given]) == 2
    said = capsys.readouterr().err
    assert "adapter 1 is DoRA's" in said
    assert "adapter 1 has 'model.embed_tokens.weight' trained whole" in said
    assert not (tmp_path / "out").exists()


def test_an_adapter_alone_may_be_rewritten(checkpoint, runs, tmp_path):
    """merge=false of one adapter: the same tensors, with DoRA and modules trained whole."""
    step = runs("modules_to_save=[lm_head, norm]")
    folder = export(tmp_path / "out", f"adapter={step}", "merge=false")
    assert {name: t.tolist() for name, t in weights(folder).items()} == {
        n: t.tolist() for n, t in weights(step).items()
    }
    assert_same_logits(logits_of(peft_model(checkpoint, folder)), logits_of(peft_model(checkpoint, step)))


def test_a_sharded_base_stays_sharded(runs, tmp_path):
    """Into as many files, in bf16 as the base is, with an index that names each tensor once."""
    base = save_tiny_checkpoint(
        tmp_path / "base", tiny_config(tie_word_embeddings=False), dtype=torch.bfloat16, max_shard_size="90KB"
    )
    lora(base, tmp_path / "run")
    step = last_step(tmp_path / "run")
    folder = export(tmp_path / "out", f"adapter={step}")
    files = sorted(file.name for file in base.glob("*.safetensors"))
    assert len(files) > 2
    assert len(list(folder.glob("*.safetensors"))) == len(files)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(weights(folder)) == set(weights(base))
    expected = merged_by_hand(base, step)
    for name, tensor in weights(folder).items():
        assert_rounded(tensor, expected[name], torch.bfloat16)
    transformers_model(folder)


@pytest.mark.parametrize("kind", ["Q8_0", "F32"])
def test_a_gguf_base(tmp_path, kind):
    """Its values as transformers reads them, with an adapter that PEFT made."""
    base = tiny_file(tmp_path / "tiny.gguf", kind=GGMLQuantizationType[kind])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(theirs, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    folder = export(tmp_path / "out", f"model_checkpoint={base}", f"adapter={tmp_path}/adapter", "dtype=fp32")
    assert_same_logits(logits_of(transformers_model(folder)), logits_of(model))
    assert (folder / "tokenizer.json").exists()


def test_a_base_alone_in_another_type(checkpoint, tmp_path):
    """Without an adapter: each value rounded once, and the rest of the folder kept."""
    folder = export(tmp_path / "out", f"model_checkpoint={checkpoint}", "dtype=bf16")
    stored = weights(checkpoint)
    assert all(torch.equal(tensor, stored[name].bfloat16()) for name, tensor in weights(folder).items())
    assert {file.name for file in folder.iterdir()} == {file.name for file in checkpoint.iterdir()}


def test_new_tokens_and_their_tokenizer(checkpoint, runs, tmp_path):
    """As the run grew them: the rows that were trained, the padding, and the tokenizer that has them."""
    folder = export(tmp_path / "out", f"adapter={runs('new_tokens=[<think>]', 'pad_vocab_to_multiple_of=8')}")
    model = transformers_model(folder)
    assert model.config.vocab_size == model.lm_head.weight.shape[0] == 408
    assert AutoTokenizer.from_pretrained(folder)("<think>")["input_ids"] == [
        len(AutoTokenizer.from_pretrained(checkpoint))
    ]


@pytest.mark.parametrize("keys", [(), ("new_tokens=[<think>]", "pad_vocab_to_multiple_of=8"), (NF4,)])
def test_a_gguf_file_has_the_adapters_merged(checkpoint, runs, tmp_path, keys):
    """The same tensors and ids as the folder, one file under the output's name and type; transformers' logits too."""
    step = runs(*keys)
    folder = export(tmp_path / "folder", f"adapter={step}", "dtype=fp32")
    out = export(tmp_path / "mine", f"adapter={step}", "format=gguf", "gguf_type=f32")
    assert [file.name for file in out.iterdir()] == ["mine-F32.gguf"]
    assert (out / "mine-F32.gguf").stat().st_mode & 0o777 == (tmp_path.stat().st_mode | 0o044) & 0o666
    expected, found = load_model(folder), load_model(out / "mine-F32.gguf")
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())
    theirs = AutoModelForCausalLM.from_pretrained(out, gguf_file="mine-F32.gguf", dtype=torch.float32)
    assert_same_logits(logits_of(theirs), logits_of(transformers_model(folder)))
    one, two = (open_checkpoint(path) for path in (folder, out / "mine-F32.gguf"))
    for text in ("Hello <think> there", "<|im_start|>user\nhi<|im_end|>\n", "naïve 日本語 🙂"):
        assert one.tokenizer().encode(text).ids == two.tokenizer().encode(text).ids
    assert one.chat_template == two.chat_template
    assert one.stop_ids == two.stop_ids


def test_a_quantised_gguf_file(checkpoint, tmp_path, capsys):
    """q8_0 of a base alone, near its logits, and what it was trained further on from."""
    out = export(tmp_path / "small", f"model_checkpoint={checkpoint}", "format=gguf", "gguf_type=q8_0")
    theirs = AutoModelForCausalLM.from_pretrained(out, gguf_file="small-Q8_0.gguf", dtype=torch.float32)
    expected = logits_of(transformers_model(checkpoint))
    assert (logits_of(theirs) - expected).abs().max() < 0.05 * expected.abs().max()
    again = export(tmp_path / "again", f"model_checkpoint={out}/small-Q8_0.gguf", "format=gguf")
    assert [file.name for file in again.iterdir()] == ["again-BF16.gguf"]


def test_what_no_gguf_file_can_be_is_refused_before_anything_is_written(checkpoint, runs, tmp_path, capsys):
    """A type by its nearest name, keys that are not for it, a family, an output that is there."""
    step, base, out = runs(), f"model_checkpoint={checkpoint}", tmp_path / "out"
    capsys.readouterr()
    gguf = (base, f"output_dir={out}", "format=gguf")
    assert "did you mean 'q8_0'?" in refused(capsys, *gguf, "gguf_type=q8_1")
    assert "'ggml' is none of safetensors | gguf | pt2" in refused(capsys, base, f"output_dir={out}", "format=ggml")
    assert "gguf_type: q8_0 is a type of GGUF files" in refused(capsys, base, f"output_dir={out}", "gguf_type=q8_0")
    said = refused(capsys, *gguf, "dtype=bf16", "max_shard_size=5GB", f"adapter={step}", "merge=false")
    assert "dtype: bf16 is a type of safetensors" in said
    assert "max_shard_size: a GGUF file is written whole" in said
    assert "an adapter is not written as GGUF" in said
    windowed = MistralConfig(**SIZES | HEADS | {"vocab_size": 400}, sliding_window=8)
    other = save_tiny_checkpoint(tmp_path / "other", windowed)
    capsys.readouterr()
    said = refused(capsys, f"model_checkpoint={other}", f"output_dir={out}", "format=gguf")
    assert "architecture 'llama': sliding_window: 8 would be lost" in said
    assert not out.exists()
    export(out, base, "format=gguf")
    capsys.readouterr()
    assert "is there and not empty" in refused(capsys, *gguf)


def test_a_gguf_file_is_whole_or_absent(checkpoint, tmp_path, capsys, monkeypatch):
    """A full disk in the middle leaves nothing."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torchtune.checkpoint.gguf_write.GGUFWriter.write", full)
    keys = (f"model_checkpoint={checkpoint}", f"output_dir={tmp_path}/work/out", "format=gguf")
    assert run(["run", "export", *keys]) == 1
    assert "No space left" in capsys.readouterr().err
    assert not list((tmp_path / "work").glob("*"))
    assert not list((tmp_path / "work").glob(".*"))


def test_a_program_has_the_adapters_merged(checkpoint, runs, tmp_path):
    """model.pt2 gives the merged folder's logits; config, tokenizer and template lie beside it, and no weights."""
    step = runs()
    folder = export(tmp_path / "folder", f"adapter={step}", "dtype=fp32")
    out = export(tmp_path / "out", f"adapter={step}", "format=pt2")
    beside = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {file.name for file in out.iterdir()} == {"model.pt2"} | beside
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        found = torch.export.load(out / "model.pt2").module()(ids)
        assert_same_logits(found, transformers_model(folder)(ids).logits)
    half = export(tmp_path / "half", f"adapter={step}", "format=pt2", "dtype=bf16")
    assert {value.dtype for value in torch.export.load(half / "model.pt2").state_dict.values()} == {torch.bfloat16}
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_program_is_traced_before_weights_are_read_and_whole_or_absent(checkpoint, tmp_path, capsys, monkeypatch):
    """What torch can't trace is named by validate too; a full disk in the middle leaves nothing."""
    keys = (f"model_checkpoint={checkpoint}", f"output_dir={tmp_path}/work/out", "format=pt2")
    said = refused(capsys, *keys, "max_shard_size=5GB", "gguf_type=q8_0")
    assert "max_shard_size: a PT2 file is written whole" in said
    assert "gguf_type: q8_0 is a type of GGUF files" in said

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("torch.export.save", full)
        assert run(["run", "export", *keys]) == 1
    assert "No space left" in capsys.readouterr().err
    assert not list((tmp_path / "work").glob("*"))
    assert not list((tmp_path / "work").glob(".*"))

    def depends_on_values(*_, **__):
        raise RuntimeError("data-dependent")

    monkeypatch.setattr("torch.export.export", depends_on_values)
    monkeypatch.setattr("torchtune.checkpoint.folder.WeightFiles.read", full)
    assert "model_type 'llama' can't be traced by torch.export: data-dependent" in refused(capsys, *keys)


@pytest.mark.parametrize(("size", "num_bytes"), [("60KB", 60_000), ("0.05MiB", 52_428), ("70000", 70_000)])
def test_shards_of_a_size(checkpoint, tmp_path, size, num_bytes):
    """No file has more bytes of tensors, unless a tensor has; the index names each."""
    folder = export(tmp_path / "out", f"model_checkpoint={checkpoint}", f"max_shard_size={size}")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        tensors = list(load_file(file).values())
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors) <= num_bytes
    assert weights(folder).keys() == weights(checkpoint).keys()
    assert_same_logits(logits_of(transformers_model(folder)), logits_of(transformers_model(checkpoint)))


def test_a_size_that_is_none(checkpoint, tmp_path, capsys):
    """It is named."""
    said = refused(capsys, f"model_checkpoint={checkpoint}", f"output_dir={tmp_path}/out", "max_shard_size=large")
    assert "'large' is no size; 5GB, 200MB" in said


def refused(capsys, *keys):
    """What `tune run export` says where it refuses, and `tune validate` before it."""
    said = []
    for verb in ("validate", "run"):
        assert run([verb, "export", *keys]) in (1, 2)
        said.append(capsys.readouterr().err)
    assert said[0] == said[1]
    return said[0]


def test_what_can_not_be_exported_is_refused_before_anything_is_written(checkpoint, runs, tmp_path, capsys):
    """An output that is there, bases that are missing or others, adapters that are none."""
    step, out = runs(), tmp_path / "out"
    capsys.readouterr()  # what training said
    there = tmp_path / "there"
    there.mkdir()
    (there / "a_file").touch()
    assert "is there and not empty" in refused(capsys, f"adapter={step}", f"output_dir={there}")
    assert "is there and not empty" in refused(capsys, f"adapter={step}", f"output_dir={there}/a_file")
    assert "is there to export" not in refused(capsys, f"output_dir={out}")
    nameless = edited(step, tmp_path / "nameless", base_model_name_or_path=None)
    assert "does not say what its base is" in refused(capsys, f"adapter={nameless}", f"output_dir={out}")
    moved = edited(step, tmp_path / "moved", base_model_name_or_path=f"{tmp_path}/nobase")
    said = refused(capsys, f"adapter={moved}", f"output_dir={out}")
    assert "model_checkpoint: " in said
    assert "nobase" in said
    assert "nowhere: there is no such folder" in refused(capsys, "adapter=nowhere", f"output_dir={out}")
    assert "has no adapter_config.json" in refused(capsys, f"adapter={checkpoint}", f"output_dir={out}")
    other = save_tiny_checkpoint(tmp_path / "other", tiny_config(hidden_size=32))
    capsys.readouterr()
    said = refused(capsys, f"model_checkpoint={other}", f"adapter={step}", f"output_dir={out}")
    assert "is an adapter for another base" in said
    assert run(["validate", "export", f"model_checkpoint={step}", f"output_dir={out}"]) == 0  # that adapter, merged
    said = refused(capsys, f"adapter={step}", "adapter_weights=[1, 2]", "dtype=bf17", f"output_dir={out}")
    assert "did you mean 'bf16'?" in said
    damaged = edited(step, tmp_path / "damaged")
    file = damaged / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "adapter_model.safetensors" in refused(capsys, f"adapter={damaged}", f"output_dir={out}")
    assert not out.exists()


def test_an_adapter_that_names_another_base_says_so(checkpoint, runs, tmp_path, capsys):
    """It fits, so it is merged; the user reads that it was made for another."""
    step = edited(runs(), tmp_path / "adapter", base_model_name_or_path="org/another-model")
    export(tmp_path / "out", f"model_checkpoint={checkpoint}", f"adapter={step}")
    assert "it says that its base is org/another-model" in capsys.readouterr().err


def test_an_adapter_for_a_model_of_another_type_is_refused(checkpoint, runs, tmp_path, capsys):
    """Though all its layers are there, in its sizes: a Mistral has a Llama's."""
    # Called as the other is, for a name says nothing.
    other = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    config = json.loads((checkpoint / "config.json").read_text())
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    (other / "config.json").write_text(json.dumps(config | mistral))
    said = refused(capsys, f"model_checkpoint={other}", f"adapter={runs()}", f"output_dir={tmp_path}/out")
    assert f"is an adapter for {checkpoint}, a llama, and {other} is a mistral" in said


def test_nothing_is_left_where_it_fails(checkpoint, runs, tmp_path, capsys, monkeypatch):
    """A full disk in the middle, and a value that fp16 can't hold: told in a line, and no folder, hidden or not."""
    huge = edited(runs(), tmp_path / "huge")
    tensors = load_file(huge / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"].fill_(1e6)
    save_file(tensors, huge / "adapter_model.safetensors")
    work = tmp_path / "work"
    keys = ["run", "export", f"adapter={huge}", f"output_dir={work}/out"]
    assert run([*keys, "dtype=fp16"]) == 1
    assert "'model.layers.1.mlp.up_proj.weight' has a value of" in capsys.readouterr().err
    assert not list(work.glob("*"))
    assert not list(work.glob(".*"))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("torchtune.checkpoint.save.shutil.copyfile", full)
        patched.setattr("torchtune.checkpoint.save.TensorWriter.write", full)
        assert run(keys) == 1
    said = capsys.readouterr().err
    assert "out: can't be written" in said
    assert "No space left" in said
    assert not list(work.glob("*"))
    left = work / ".out.writing"
    left.mkdir()
    (left / "half").touch()  # as a kill leaves it
    assert run(keys) == 0
    assert [entry.name for entry in work.iterdir()] == ["out"]
    assert not (work / "out" / "half").exists()


def test_the_folder_that_one_is_in_is_not_replaced(runs, tmp_path, monkeypatch, capsys):
    """An empty folder is filled, but not the one that would be gone under one's feet."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert run(["run", "export", f"adapter={runs()}", "output_dir=."]) == 2
    assert "output_dir: " in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    export("empty", f"adapter={runs()}")
    assert (tmp_path / "empty" / "model.safetensors").exists()


def test_each_weight_is_read_once(checkpoint, runs, tmp_path, monkeypatch):
    """Each weight of the base is read once, when its turn has come."""
    from torchtune.checkpoint.folder import WeightFiles

    read, read_tensor = [], WeightFiles.read

    def noted(self, name):
        read.append(name)
        return read_tensor(self, name)

    monkeypatch.setattr(WeightFiles, "read", noted)
    export(tmp_path / "out", f"adapter={runs()}")
    of_base = [name for name in read if not name.startswith("base_model.")]
    assert len(of_base) == len(set(of_base))
    assert set(of_base) == set(weights(checkpoint))


def test_it_can_be_trained_on(runs, tmp_path):
    """What was exported is a base like any other, also elsewhere."""
    folder = shutil.move(export(tmp_path / "out", f"adapter={runs()}"), tmp_path / "elsewhere")
    lora(folder, tmp_path / "run", "max_steps=1")
    config = json.loads((tmp_path / "run" / "step_1" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)


def test_a_scale_without_a_short_form_is_kept_whole(checkpoint, tmp_path):
    """PiSSA's doubled rank under rsLoRA gives alphas like the square root of 2; over NF4 its last digits tell."""
    keys = (NF4, "lora_init=pissa", "use_rslora=true", "lora_alpha=1", "lora_rank=2", "save_merged=true", "max_steps=1")
    lora(checkpoint, tmp_path / "run", *keys)
    step = last_step(tmp_path / "run")
    assert json.loads((step / "adapter_config.json").read_text())["lora_alpha"] == pytest.approx(2**0.5, rel=1e-15)
    folder = export(tmp_path / "out", f"adapter={step}")
    assert (folder / "model.safetensors").read_bytes() == (step / "merged" / "model.safetensors").read_bytes()
