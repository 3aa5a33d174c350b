"""Public reports about adapters, by their numbers in the log of cases; C092's are in test_lora_resume.py."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint as reentrant_checkpoint

from tests.checkpoint.test_fp8 import quantised_folder
from tests.hub_server import HubHandler, run_against, served
from tests.recipes.conftest import CASES, ROWS
from tests.recipes.lora_runs import (
    assert_same_logits,
    edited,
    export,
    keys_of,
    logits_of,
    lora,
    lora_recipe,
    peft_model,
    transformers_model,
)
from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_tokenizer
from torchtune.cli.tune import run
from torchtune.errors import TrainingError
from torchtune.recipes.lora_finetune import LoRAFinetuneRecipe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_case_c083_every_save_has_plain_names(checkpoint, tmp_path):
    """Compiled, with activation checkpointing and with both: intermediate, last and merged saves have a plain run's keys.

    PEFT misses none of them, every lora_B has moved, and the losses are the plain run's.
    """
    compiled, checkpointed = "compile=true", "enable_activation_checkpointing=true"
    kinds = {"plain": (), "compiled": (compiled,), "checkpointed": (checkpointed,), "both": (compiled, checkpointed)}
    losses = {}
    for name, keys in kinds.items():
        metrics = lora(checkpoint, tmp_path / name, "max_steps=2", "save_every_n_steps=1", "save_merged=true", *keys)
        losses[name] = [line["loss"] for line in metrics]
        assert losses[name] == pytest.approx(losses["plain"], rel=1e-4)
        for step in ("step_1", "step_2"):
            folder = tmp_path / name / step
            for file in ("adapter_model.safetensors", "merged/model.safetensors"):
                plain, found = (load_file(tmp_path / run / step / file) for run in ("plain", name))
                assert {key: tensor.shape for key, tensor in found.items()} == {k: t.shape for k, t in plain.items()}
            adapter = load_file(folder / "adapter_model.safetensors")
            assert all(tensor.any() for key, tensor in adapter.items() if "lora_B" in key)
            merged = transformers_model(folder / "merged")
            assert_same_logits(logits_of(peft_model(checkpoint, folder)), logits_of(merged))


def gradients_of_steps(base, out, *keys):
    """The gradients of each step's first micro-batches, by name."""
    found = []

    class Noting(LoRAFinetuneRecipe):
        def _setup_optimizer(self, params, ckpt_dict):
            optimizer = super()._setup_optimizer(params, ckpt_dict)
            gather = self._optimization.gather_gradients

            def gather_gradients():
                norm = gather()
                named = self._model.named_parameters()
                found.append({name: p.grad.clone() for name, p in named if p.grad is not None})
                return norm

            self._optimization.gather_gradients = gather_gradients
            return optimizer

    lora_recipe(base, out, "max_steps=2", *keys, recipe_class=Noting)
    return found


@pytest.mark.parametrize("keys", [(), ("lora_dropout=0.2", "use_dora=true"), ("modules_to_save=[norm]",)])
def test_case_c086_checkpointing_loses_no_gradient(checkpoint, tmp_path, keys):
    """With the embedding frozen: all of lora_A and lora_B have one, the same as without, and all of lora_B move."""
    plain = gradients_of_steps(checkpoint, tmp_path / "plain", *keys)
    checkpointed = gradients_of_steps(checkpoint, tmp_path / "on", "enable_activation_checkpointing=true", *keys)
    assert len(plain) == len(checkpointed) == 2
    for one, two in zip(plain, checkpointed, strict=True):
        assert one.keys() == two.keys()
        assert sum("lora_A" in name for name in one) == sum("lora_B" in name for name in one) == 14
        for name, gradient in one.items():
            torch.testing.assert_close(two[name], gradient, rtol=0, atol=1e-6)
    # The second step's gradient of A is not zero where the first has moved B.
    assert all(gradient.any() for gradient in checkpointed[1].values())


def test_case_c086_a_parameter_without_a_gradient_is_an_error(checkpoint, tmp_path, monkeypatch):
    """Reentrant checkpointing behind a frozen embedding, as those reports had it: nothing is trained, and it is told."""

    def reentrant(layers, **options):
        for layer in layers:
            layer.forward = partial(reentrant_checkpoint, layer.forward, use_reentrant=True)

    monkeypatch.setattr("torchtune.recipes.lora_finetune.apply_activation_checkpointing", reentrant)
    keys = ("modules_to_save=[norm]", "enable_activation_checkpointing=true")
    with pytest.raises(TrainingError, match=r"28 of 29 trained parameters got no gradient.*lora_A"):
        lora_recipe(checkpoint, tmp_path / "out", *keys)
    assert not list((tmp_path / "out").glob("step_*"))


@pytest.mark.parametrize(
    ("quantised", "method"),
    [({"quant_method": "gptq", "bits": 4}, "gptq"), ({"bnb_4bit_quant_type": "fp4"}, "bitsandbytes")],
)
def test_case_c087_a_base_that_cannot_be_read_is_refused_by_its_method(tmp_path, capsys, quantised, method):
    """Before its weights are read: there are none. The row's own NF4 is read (tests/recipes/test_quantize.py)."""
    base = tmp_path / "base"
    base.mkdir()
    config = json.loads((CASES / "C087_config.json").read_text())
    config["quantization_config"] |= quantised
    (base / "config.json").write_text(json.dumps(config))
    save_file({"model.norm.weight": torch.ones(16)}, base / "model.safetensors")
    tiny_tokenizer().save_pretrained(base)
    for verb, recipe, keys in (
        ("validate", "lora_finetune", keys_of(base, tmp_path / "out", "base_quantization=nf4")),
        ("run", "lora_finetune", keys_of(base, tmp_path / "out")),
        ("run", "export", [f"model_checkpoint={base}", f"output_dir={tmp_path}/out"]),
    ):
        assert run([verb, recipe, *keys]) in (1, 2)
        assert f"'{method}'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_case_c087_merged_weights_say_nothing_of_quantisation(tmp_path, quantization):
    """Of a base in FP8, and over one that was quantised for the run: floats alone, and no quantization_config."""
    base = tmp_path / "base"
    quantised_folder(base)
    config = json.loads((base / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fp8"
    config |= {"vocab_size": 400}
    tensors = load_file(base / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.randn(400, tensors[name].shape[1]).bfloat16() * 0.05
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps(config))
    tiny_tokenizer().save_pretrained(base)
    out = tmp_path / "out"
    lora(base, out, "lora_targets=attention", f"base_quantization={quantization}", "save_merged=true", "max_steps=1")
    exported = export(tmp_path / "exported", f"adapter={out}/step_1")
    for folder in (out / "step_1" / "merged", exported):
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
        merged = load_file(folder / "model.safetensors")
        assert {tensor.dtype for tensor in merged.values()} <= {torch.bfloat16, torch.float32}
        assert not any(name.endswith("_scale_inv") for name in merged)
        assert logits_of(transformers_model(folder)).isfinite().all()


class Hub(HubHandler):
    """Serves each folder ORG/NAME as a repository."""

    commit = "1" * 40

    def answer(self, *, body):
        path = self.path.partition("?")[0].removeprefix("/api/models").strip("/")
        repo, name = "/".join(path.split("/")[:2]), path.partition("/resolve/")[2].partition("/")[2]
        if not (self.folder / repo).is_dir():
            return self.send(b"", body, 404, {"X-Error-Code": "RepoNotFound"})
        if "/resolve/" in path:
            file = self.folder / repo / name
            return self.send_file(file, body) if file.is_file() else self.send(b"", body, 404)
        files = [
            str(file.relative_to(self.folder / repo)) for file in (self.folder / repo).rglob("*") if file.is_file()
        ]
        if "/tree/" in path:
            content = [{"type": "file", "path": file, "size": 1, "oid": "0" * 40} for file in files]
        else:
            content = {"id": repo, "sha": self.commit, "siblings": [{"rfilename": file} for file in files]}
        return self.send(json.dumps(content).encode(), body)


COMMANDS = """
import json, shutil, sys
from pathlib import Path
from torchtune.cli.tune import run
for arguments in json.loads(sys.argv[1]):
    if arguments[0] == "publish":
        Path(arguments[2]).mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(Path(arguments[1]) / name, arguments[2])
    elif code := run(arguments):
        sys.exit(code)
"""


def paths_in(folder):
    """Absolute paths in the JSON files right in a folder."""
    text = "\n".join(file.read_text() for file in Path(folder).glob("*.json") if file.name != "tokenizer.json")
    return re.findall(r'"(/[^"]*/[^"]*)"', text)


@pytest.mark.timeout(120)
def test_case_c126_an_adapter_needs_its_folder_and_the_bases_id_alone(tmp_path):
    """By hub ids: trained on one, published with two files, exported from there; no path of this machine is written."""
    base = save_tiny_checkpoint(tmp_path / "hub" / "org" / "tiny")
    out, again = tmp_path / "exported", tmp_path / "again"
    commands = [
        ["run", "lora_finetune", *keys_of("org/tiny", tmp_path / "run", "max_steps=1", "optimizer.lr=1e-2")],
        ["publish", f"{tmp_path}/run/step_1", f"{tmp_path}/hub/me/mine"],
        ["run", "export", "adapter=me/mine", f"output_dir={out}"],
        ["run", "export", "adapter=me/mine", "merge=false", f"output_dir={again}"],
    ]
    with served(Hub, tmp_path / "hub") as url:
        done = run_against(url, COMMANDS, json.dumps(commands), home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert "by its path here" not in done.stderr
    for folder in (tmp_path / "run" / "step_1", again):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "org/tiny"
    for folder in (tmp_path / "run" / "step_1", again, out):
        assert paths_in(folder) == []
    expected = logits_of(peft_model(base, tmp_path / "hub" / "me" / "mine"))
    assert_same_logits(logits_of(transformers_model(out)), expected)
    assert_same_logits(logits_of(peft_model(base, again)), expected)


def test_case_c126_a_path_is_told(checkpoint, tmp_path, capsys, monkeypatch):
    """Where the base is a folder here, the adapter can name it by no more than its path: the run says so, as export does."""
    monkeypatch.chdir(tmp_path)
    lora(checkpoint, "run", "max_steps=1")
    assert f"will name its base by its path here, {checkpoint};" in capsys.readouterr().err
    export("again", "adapter=run/step_1", "merge=false")
    assert f"will name its base by its path here, {checkpoint};" in capsys.readouterr().err
    merged = export("merged", "adapter=run/step_1")
    assert paths_in(merged) == []
    cached = shutil.copytree(checkpoint, tmp_path / "models--org--tiny" / "snapshots" / "1")
    named = shutil.copytree(checkpoint, tmp_path / "named")
    config = json.loads((named / "config.json").read_text())
    (named / "config.json").write_text(json.dumps(config | {"_name_or_path": "org/tiny"}))
    for name, base in {"second": "named", "third": cached}.items():
        capsys.readouterr()
        lora(base, name, "max_steps=1")
        assert "by its path" not in capsys.readouterr().err
        written = json.loads(Path(name, "step_1", "adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == "org/tiny"
        assert paths_in(f"{name}/step_1") == []


def test_case_c126_a_path_in_the_bases_config_is_told(checkpoint, tmp_path, capsys):
    """What transformers once wrote there goes into the merged model's config, as every field does."""
    base = shutil.copytree(checkpoint, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"_name_or_path": "/home/somebody/model"}))
    lora(base, tmp_path / "run", "max_steps=1", "save_merged=true")
    assert "keeps the base's _name_or_path, /home/somebody/model" in capsys.readouterr().err
    folder = export(tmp_path / "out", f"adapter={tmp_path}/run/step_1")
    assert "keeps the base's _name_or_path, /home/somebody/model" in capsys.readouterr().err
    assert paths_in(folder) == ["/home/somebody/model"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_case_c126_adapters_and_outputs_of_each_type_load(checkpoint, tmp_path, dtype):
    """In PEFT, in transformers and in a run that goes on."""
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    lora(checkpoint, tmp_path / "run", "max_steps=1")
    adapter = edited(tmp_path / "run" / "step_1", tmp_path / "adapter")
    tensors = {name: tensor.to(kind) for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    folder = export(tmp_path / "out", f"adapter={adapter}", f"dtype={dtype}")
    model = transformers_model(folder, kind)
    assert {parameter.dtype for parameter in model.parameters()} == {kind}
    exact = export(tmp_path / "exact", f"adapter={adapter}")
    assert_same_logits(logits_of(transformers_model(exact)), logits_of(peft_model(checkpoint, adapter)))
    metrics = lora(checkpoint, tmp_path / "second", f"adapter={adapter}", f"eval_dataset={ROWS}", "max_steps=1")
    assert metrics[-1]["eval_loss"] < metrics[-1]["loss"]
