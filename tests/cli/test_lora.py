"""`tune validate lora_finetune` and `export`: every mistake by its key, all at once, before a weight of the base is read."""

import dataclasses
import os
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.recipes.lora_runs import edited, last_step, lora
from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_config
from torchtune.checkpoint.folder import WeightFiles
from torchtune.cli.tune import run
from torchtune.recipes.export import ExportParams
from torchtune.recipes.lora_finetune import LoRAFinetuneParams

DATASET = "dataset=" + str(os.path.join(os.path.dirname(os.path.dirname(__file__)), "cases", "common_rows24.jsonl"))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A tiny checkpoint."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("cli-lora") / "tiny-llama")


@pytest.fixture(scope="module")
def adapter(real, tmp_path_factory):
    """An adapter for it, of rank 4."""
    out = tmp_path_factory.mktemp("cli-lora-run") / "out"
    lora(real, out, "max_steps=1")
    return last_step(out)


@pytest.fixture
def base(real, tmp_path, monkeypatch):
    """The checkpoint without the content of its weights: zeros, which must not be read."""
    folder = shutil.copytree(real, tmp_path / "base")
    weights = folder / "model.safetensors"
    header, size = (
        weights.read_bytes()[: 8 + int.from_bytes(weights.read_bytes()[:8], "little")],
        weights.stat().st_size,
    )
    weights.write_bytes(header)
    os.truncate(weights, size)
    read = WeightFiles.read

    def refused(self, name):
        assert self.headers[name].file != weights, f"'{name}' was read"
        return read(self, name)

    monkeypatch.setattr(WeightFiles, "read", refused)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def said(base, tmp_path, capsys):
    """What `validate` says of keys, and `run` like it; status 2, nothing written."""

    def look(*keys, model=base):
        texts = []
        capsys.readouterr()
        for verb in ("validate", "run"):
            before = sorted(tmp_path.rglob("*"))
            assert run([verb, "lora_finetune", f"model_checkpoint={model}", DATASET, *map(str, keys)]) == 2
            texts.append(capsys.readouterr().err)
            assert sorted(tmp_path.rglob("*")) == before
        assert texts[0] == texts[1]
        return texts[0]

    return look


def problems(text):
    """How many were told."""
    lines = text.strip().splitlines()
    return int(lines[-1].split()[0]) if lines[-1].endswith("nothing was loaded.") else len(lines)


def test_what_is_right_is_said_so(base, adapter, capsys):
    """With all kinds of keys at once, and the base's weights unread."""
    keys = (
        *("lora_targets=[attention, mlp]", "lora_rank_pattern={o_proj: 2}", "lora_alpha_pattern={q_proj: 3}"),
        *("modules_to_save=[lm_head]", "use_dora=true", "base_quantization=nf4", f"frozen_adapters=[{adapter}]"),
    )
    assert run(["validate", "lora_finetune", f"model_checkpoint={base}", DATASET, *keys]) == 0
    assert run(["validate", "export", f"model_checkpoint={base}", f"adapter={adapter}", "output_dir=out"]) == 0
    assert capsys.readouterr().out.count("the options are right") == 2


def test_misspelt_keys_and_values_are_told_together(said):
    """By the nearest that there is."""
    keys = (
        "lora_rnak=4",
        "base_quantization=nf5",
        "lora_init=pisa",
        "lora_dropout=1.5",
        "lora_alpha=-1",
        "use_dora=maybe",
    )
    text = said(*keys)
    for part in (
        "'lora_rank'?",
        "'nf4'?",
        "'pissa'?",
        "lora_dropout: should be",
        "lora_alpha: should be",
        "use_dora: ",
    ):
        assert part in text
    assert problems(text) == 6


def test_keys_that_do_not_go_together_are_told_together(said):
    """Each pair by the key that is to change."""
    text = said("use_dora=true", "lora_init=pissa", "lora_targets=[]")
    assert "lora_init: 'pissa' is for plain LoRA" in text
    assert "lora_targets: " in text
    assert "freeze: the base is frozen already" in said("freeze=[norm]")
    assert "'loftq' makes up for quantisation" in said("lora_init=loftq")


def test_misspelt_layers_and_too_large_ranks_are_told_together(said):
    """Layers, modules, ranks and patterns; and data and paths besides."""
    keys = ("lora_targets=[q_porj, atention, v_proj]", "modules_to_save=[nrom, lm_hed]", "lora_rank=33")
    text = said(*keys, "frozen_adapters=[nowhere]", "lora_alpha_pattern={v_proj: 3}")
    for part in (
        "'q_proj'?",
        "'attention'?",
        "'norm'?",
        "'lm_head'",
        "rank 33 does not fit 'model.layers.0.self_attn.v_proj'",
    ):
        assert part in text, text
    assert "frozen_adapters: nowhere: there is no such folder or file" in text
    assert problems(text) == 6
    text = said("lora_rank_pattern={o_porj: 2}", "lora_alpha_pattern={x: 2}", "lora_rank=33")
    assert "lora_rank_pattern: 'o_porj' (2) fits no adapted layer" in text
    assert "lora_alpha_pattern: 'x' (2.0) fits no adapted layer" in text
    assert "'model.layers.0.self_attn.k_proj'" in text
    assert problems(text) == 3


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        (["lora_layers=[2]"], "lora_layers: 2 is no layer of this model: they are 0 to 1"),
        (["lora_targets=lm_head"], "lora_targets: 'lm_head' is tied to the embedding"),
        (["lora_targets=embed_tokens"], "lora_targets: 'model.embed_tokens' is the head too"),
        (["lora_targets=norm"], "lora_targets: 'norm' is no linear layer; modules_to_save trains it whole"),
        (["lora_targets=experts"], "lora_targets: this model has nothing that 'experts' names"),
        (["lora_targets=['(q']"], "lora_targets: '(q' is no regular expression"),
        (["lora_rank_pattern={'(q': 2}"], "lora_rank_pattern: "),
        (["lora_targets=[q_proj]", "modules_to_save=[self_attn]"], "modules_to_save: 'model.layers.0.self_attn'"),
        (["lora_targets=mpl"], "did you mean 'mlp'?"),
    ],
)
def test_what_is_no_target_says_why(said, keys, part):
    """One a line."""
    assert part in said(*keys)


def test_an_adapter_that_is_missing_or_damaged_is_told_by_its_key(said, adapter, real, tmp_path):
    """Both keys, each adapter, by folder, file and what is wrong."""
    cut = edited(adapter, tmp_path / "cut")
    file = cut / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    empty = edited(adapter, tmp_path / "empty")
    (empty / "adapter_model.safetensors").unlink()
    text = said("adapter=nowhere", f"frozen_adapters=[{cut}, {empty}, {real}]")
    assert "adapter: nowhere: there is no such folder or file" in text
    assert f"frozen_adapters: {file}: it has" in text
    assert f"frozen_adapters: {empty}: has neither adapter_model.safetensors" in text
    assert f"frozen_adapters: {real}: has no adapter_config.json" in text
    assert problems(text) == 4


def test_an_adapter_of_another_kind_or_base_is_told(said, adapter, tmp_path):
    """Another method, an option that would be dropped, other layers, other sizes, another rank than it says."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"

    def changed(name, values, **config):
        folder = edited(adapter, tmp_path / name, **config)
        save_file(values, folder / "adapter_model.safetensors")
        return folder

    renamed = {name.replace("mlp.up_proj", "mlp.up_porj"): value for name, value in tensors.items()}
    adapters = {
        "another kind": ("'IA3'", changed("kind", tensors, peft_type="IA3")),
        "an option": ("trainable_token_indices", changed("option", tensors, trainable_token_indices=[1])),
        "layers": ("up_porj', and this model no such layer; did you mean", changed("layers", renamed)),
        "sizes": (
            "is 95 x 64 of rank 4, this model's 96 x 64",
            changed("sizes", tensors | {key: tensors[key][1:].clone()}),
        ),
        "rank": (
            "has rank 4 in adapter_model.safetensors, and adapter_config.json says 7",
            changed("rank", tensors, r=7),
        ),
        "half": ("up_proj.lora_B' is missing", changed("half", {k: v for k, v in tensors.items() if k != key})),
    }
    text = said("frozen_adapters=[" + ", ".join(str(folder) for _, folder in adapters.values()) + "]")
    for what, (part, folder) in adapters.items():
        assert part in text, (what, text)
        assert str(folder) in text
    assert problems(text) == len(adapters)


def test_an_adapter_for_another_base_is_refused_by_name(said, adapter, tmp_path):
    """Of other width, or with other layers."""
    other = save_tiny_checkpoint(tmp_path / "other", tiny_config(hidden_size=32))
    text = said(f"adapter={adapter}", model=other)
    assert f"adapter: {adapter}: is an adapter for another base" in text
    fewer = save_tiny_checkpoint(tmp_path / "fewer", tiny_config(num_hidden_layers=1))
    assert "layers.1." in said(f"adapter={adapter}", model=fewer)


def test_keys_beside_an_adapter_are_told_by_their_names(said, adapter):
    """Together with what else is wrong."""
    text = said(f"adapter={adapter}", "lora_rank=8", "lora_layers=[0]", "frozen_adapters=[nowhere]")
    for part in ("lora_rank: 8, and the adapter has 4", "lora_layers: the adapter", "frozen_adapters: nowhere"):
        assert part in text
    assert problems(text) == 3


@pytest.mark.parametrize(("recipe", "params"), [("lora_finetune", LoRAFinetuneParams), ("export", ExportParams)])
def test_help_lists_every_key(recipe, params, capsys):
    """Each with its type, its default and a line."""
    with pytest.raises(SystemExit) as ended:
        run(["run", recipe, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(params):
        assert f"  {field.name}  (" in text


def test_a_config_with_its_recipes_name_is_given_by_config(real, tmp_path, capsys):
    """`tune validate RECIPE --config NAME` is read as it stands, where a config has the recipe's name."""
    keys = [f"model_checkpoint={real}", DATASET, f"output_dir={tmp_path / 'out'}"]
    assert run(["validate", "lora_finetune", "--config", "lora_finetune", *keys]) == 0
    assert "the options are right" in capsys.readouterr().out


def test_a_list_without_brackets_is_told(real, tmp_path, capsys):
    """A usual slip on the command line."""
    keys = [f"model_checkpoint={real}", DATASET, f"output_dir={tmp_path / 'out'}"]
    assert run(["validate", "lora_finetune", *keys, "lora_targets=q_proj,v_proj"]) == 2
    assert "[q_proj,v_proj]" in capsys.readouterr().err
