"""Adapter folders both ways: PEFT reads what we write, we read what PEFT writes, and merging gives the same model."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.adapters.peft_oracle import (
    adapted,
    check_same_logits,
    disturb,
    load_peft,
    load_theirs,
    meta_model,
)
from tests.models.oracle import save_random, stored_tensors
from tests.models.support import config_of
from torchtune.adapters.config import LoRAConfig
from torchtune.checkpoint.peft_read import read_adapter
from torchtune.errors import CheckpointError, UnsupportedError
from torchtune.models.build import FILES

CASES = Path(__file__).parent.parent / "cases"
# What PEFT 0.21 takes for linear layers and this package does not: the parts that see.
SEEING = ("gemma3", "mistral3")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A base with a head of its own."""
    folder = tmp_path_factory.mktemp("llama")
    save_random(folder, config_of("llama"))
    return folder


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A base with a tied head."""
    folder = tmp_path_factory.mktemp("gemma")
    save_random(folder, config_of("gemma2"))
    return folder


def write_ours(base, folder, **options):
    """A trained adapter of ours, and the model that it is in."""
    ours = adapted(base, LoRAConfig(**{"rank": 3, "alpha": 5.0, **options}))
    disturb(ours.model)
    ours.save(folder)
    return ours


def write_theirs(base, folder, *, seed=1, **options):
    """A trained adapter of PEFT's, and the model that it is in; tied matrices stay one."""
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 3, "lora_alpha": 5, "init_lora_weights": False, **options})
    model = get_peft_model(load_theirs(base), config).eval()
    disturb(model)
    model.save_pretrained(folder)
    return model


def config_in(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def change_config(folder, **changes):
    """Write other values into adapter_config.json; `...` takes a key out."""
    values = {key: value for key, value in {**config_in(folder), **changes}.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(values))


def change_tensors(folder, change):
    """Write what `change` makes of the tensors."""
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


OURS = {
    "lora": {},
    "one layer": {"layers": (1,), "rank_pattern": {"o_proj": 2}, "alpha_pattern": {r".*\.mlp\..*": 1.5}},
    "rslora": {"use_rslora": True, "targets": ("attention",), "rank_pattern": {r"layers\.2\..*": 5}},
    "dora": {"use_dora": True},
    "dora with patterns": {"use_dora": True, "use_rslora": True, "targets": ("mlp",), "rank_pattern": {"up_proj": 7}},
    "regular expression": {"targets": (r".*\.[02]\..*(q|v)_proj", "layers.1.mlp.down_proj")},
    "dropout": {"dropout": 0.3},
}


@pytest.mark.parametrize("options", OURS.values(), ids=OURS)
@pytest.mark.parametrize("base", ["llama", "gemma"])
def test_peft_reads_ours(request, tmp_path, base, options):
    """Logits within 1e-5 of their maximum, and every tensor has found its place."""
    folder = request.getfixturevalue(base)
    ours = write_ours(folder, tmp_path / "ours", **options)
    theirs = load_peft(folder, tmp_path / "ours")
    check_same_logits(ours.model.eval(), theirs)
    again = adapted(folder, adapter=tmp_path / "ours")
    check_same_logits(again.model.eval(), ours.model, share=0)
    again.save(tmp_path / "again")
    assert config_in(tmp_path / "again") == config_in(tmp_path / "ours")


WHOLE = {
    "head": ("llama", {"modules_to_save": ("lm_head",)}),
    "embedding": ("llama", {"modules_to_save": ("embed_tokens",), "targets": ("mlp",)}),
    "both": ("llama", {"modules_to_save": ("embed_tokens", "lm_head"), "use_dora": True}),
    "norms": ("llama", {"modules_to_save": ("norm", "input_layernorm")}),
    "attention": ("llama", {"modules_to_save": ("self_attn",), "targets": ("mlp",)}),
    "one norm": ("llama", {"modules_to_save": ("model.layers.0.input_layernorm",)}),
    "tied head": ("gemma", {"modules_to_save": ("lm_head",), "use_dora": True}),
    "tied embedding": ("gemma", {"modules_to_save": ("embed_tokens", "norm")}),
    "adapted head": ("llama", {"targets": ("q_proj", "lm_head")}),
    "adapted embedding": ("llama", {"targets": ("q_proj", "lm_head", "embed_tokens"), "use_rslora": True}),
}


@pytest.mark.parametrize(("base", "options"), WHOLE.values(), ids=WHOLE)
def test_embeddings_heads_and_norms(request, tmp_path, base, options):
    """Trained whole or adapted, tied or not: PEFT's logits are ours, the merged model's too."""
    folder = request.getfixturevalue(base)
    ours = write_ours(folder, tmp_path / "ours", **options)
    check_same_logits(ours.model, load_peft(folder, tmp_path / "ours"))
    check_same_logits(load_theirs(ours.save_merged(tmp_path / "merged")), ours.model)
    check_same_logits(adapted(folder, adapter=tmp_path / "ours").model, ours.model, share=0)


THEIRS = {
    "all-linear": {"target_modules": "all-linear"},
    "regular expression": {"target_modules": r".*\.[01]\.self_attn\.(q|k)_proj"},
    "rslora": {"target_modules": ["q_proj", "gate_proj"], "use_rslora": True, "r": 6},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "patterns": {
        "target_modules": ["o_proj", "up_proj"],
        "rank_pattern": {"up_proj": 5, r"^model\.layers\.0\.self_attn\.o_proj": 2},
        "alpha_pattern": {"layers.[12].self_attn.o_proj": 11},
    },
    "layers": {"target_modules": ["k_proj"], "layers_to_transform": [0, 2]},
    "without some": {"target_modules": ["k_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.v_proj"]},
    "gaussian": {"target_modules": ["v_proj"], "init_lora_weights": "gaussian"},
    "head": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"]},
    "embedding and head": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "adapted embedding": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "weights": {
        "target_modules": ["o_proj"],
        "target_parameters": ["self_attn.q_proj.weight", "mlp.up_proj.weight"],
        "rank_pattern": {"up_proj.weight": 5, "o_proj": 2},
        "alpha_pattern": {"q_proj.weight": 2},
    },
}


@pytest.mark.parametrize("options", THEIRS.values(), ids=THEIRS)
def test_we_read_theirs(llama, tmp_path, options):
    """Logits within 1e-5 of their maximum; written again, PEFT gets back what it had."""
    theirs = write_theirs(llama, tmp_path / "theirs", **options)
    ours = adapted(llama, adapter=tmp_path / "theirs")
    check_same_logits(ours.model, theirs)
    ours.save(tmp_path / "ours")
    check_same_logits(load_peft(llama, tmp_path / "ours"), theirs)
    check_same_logits(load_theirs(ours.save_merged(tmp_path / "merged")), theirs)


@pytest.mark.parametrize("names", [["embed_tokens", "lm_head"], ["embed_tokens"], ["lm_head"]])
def test_we_read_a_tied_matrix_of_theirs(gemma, tmp_path, names):
    """Where PEFT was told to keep embedding and head one."""
    theirs = write_theirs(gemma, tmp_path, target_modules=["q_proj"], modules_to_save=names, ensure_weight_tying=True)
    check_same_logits(adapted(gemma, adapter=tmp_path).model, theirs)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("mixtral", {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
        (
            "mixtral",
            {"target_parameters": ["layers.1.mlp.experts.down_proj"], "rank_pattern": {"experts.down_proj": 2}},
        ),
        ("qwen3_moe", {"target_parameters": ["experts.gate_up_proj"], "alpha_pattern": {"experts.gate_up_proj": 9}}),
        ("gpt_oss", {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "use_rslora": True}),
        ("llama4_text", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
        ("deepseek_v3", {"target_parameters": ["mlp.experts.down_proj"], "modules_to_save": ["lm_head", "gate"]}),
    ],
)
def test_we_read_experts_of_theirs(tmp_path, model_type, options):
    """Stacks of experts, both projections or one, as PEFT's `target_parameters`."""
    save_random(tmp_path / "base", config_of(model_type))
    theirs = write_theirs(tmp_path / "base", tmp_path / "theirs", target_modules=["q_proj", "q_b_proj"], **options)
    ours = adapted(tmp_path / "base", adapter=tmp_path / "theirs")
    check_same_logits(ours.model, theirs)
    ours.save(tmp_path / "ours")
    check_same_logits(load_peft(tmp_path / "base", tmp_path / "ours"), theirs)


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v2", "qwen2_moe", "qwen3_moe", "granitemoeshared"])
@pytest.mark.parametrize("targets", ["all-linear", ["o_proj", "gate_proj", "up_proj", "down_proj"]], ids=["all", "mlp"])
def test_we_read_what_peft_makes_of_a_mixture(tmp_path, model_type, targets):
    """It takes these names for the experts' stacks, and all linear layers for routers and gates of one output too."""
    save_random(tmp_path / "base", config_of(model_type))
    theirs = write_theirs(tmp_path / "base", tmp_path / "theirs", target_modules=targets)
    ours = adapted(tmp_path / "base", adapter=tmp_path / "theirs")
    check_same_logits(ours.model, theirs)
    check_same_logits(load_theirs(ours.save_merged(tmp_path / "merged")), theirs)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("mixtral", {"targets": ("experts", "o_proj"), "layers": (1,)}),
        ("mixtral", {"targets": ("all-linear", "experts", "gate"), "alpha_pattern": {"gate": 1.0}, "use_rslora": True}),
        ("gpt_oss", {"targets": ("router", "experts.down_proj"), "rank_pattern": {r".*\.1\..*": 2}}),
        ("llama4_text", {"targets": ("router", "q_proj")}),
        ("llama4_text", {"targets": ("experts", "q_proj")}),
        ("llama4_text", {"targets": ("experts.down_proj",), "layers": (1,)}),
        ("glm4_moe", {"targets": ("mlp", "gate"), "layers": (0, 2)}),
        ("granitemoe", {"targets": ("router",), "modules_to_save": ("experts",)}),
        ("gpt_oss", {"targets": ("router",), "modules_to_save": ("self_attn",)}),
        ("deepseek_v3", {"targets": ("attention",), "modules_to_save": ("gate", "kv_a_layernorm")}),
        ("deepseek_v3", {"targets": ("attention",), "use_dora": True, "modules_to_save": ("shared_experts",)}),
        ("qwen2_moe", {"targets": ("attention",), "dropout": 0.1, "modules_to_save": ("gate", "shared_expert_gate")}),
    ],
)
def test_peft_reads_our_mixtures(tmp_path, model_type, options):
    """Experts, routers and what stands beside them, in all layers or some; and the merged model is the same."""
    save_random(tmp_path / "base", config_of(model_type))
    ours = write_ours(tmp_path / "base", tmp_path / "ours", **options)
    check_same_logits(load_peft(tmp_path / "base", tmp_path / "ours"), ours.model.eval())
    check_same_logits(load_theirs(ours.save_merged(tmp_path / "merged")), ours.model)
    check_same_logits(adapted(tmp_path / "base", adapter=tmp_path / "ours").model.eval(), ours.model, share=0)


def test_dora_of_a_mixtures_mlp(tmp_path):
    """PEFT takes its names for the experts' and has no DoRA there; merged it is what was trained."""
    save_random(tmp_path / "base", config_of("deepseek_v3"))
    ours = write_ours(tmp_path / "base", tmp_path / "ours", use_dora=True)
    with pytest.raises(ValueError, match="use_dora"):
        load_peft(tmp_path / "base", tmp_path / "ours")
    check_same_logits(load_theirs(ours.save_merged(tmp_path / "merged")), ours.model)
    check_same_logits(adapted(tmp_path / "base", adapter=tmp_path / "ours").model, ours.model, share=0)


@pytest.mark.parametrize("model_type", sorted(FILES))
def test_every_family(tmp_path, model_type):
    """Ours in PEFT, PEFT's in ours, and merged: logits, and each tensor as PEFT merges it."""
    base = tmp_path / "base"
    save_random(base, config_of(model_type))
    ours = write_ours(base, tmp_path / "ours", use_rslora=True, rank_pattern={r".*\.1\..*": 2})
    theirs = load_peft(base, tmp_path / "ours")
    expected = check_same_logits(ours.model, theirs)
    merged = load_theirs(ours.save_merged(tmp_path / "merged"))
    check_same_logits(merged, ours.model, share=1e-4)
    theirs.merge_and_unload().save_pretrained(tmp_path / "merged by peft")
    check_merged(tmp_path / "merged", tmp_path / "merged by peft")
    ours.save_merged(tmp_path / "merged in bf16", dtype=torch.bfloat16)
    check_merged(tmp_path / "merged in bf16", tmp_path / "merged by peft", rounding=2**-8)
    del theirs, merged, expected


def check_merged(ours, theirs, *, rounding=0.0):
    """Every tensor, within float32's noise and a rounding of its own values."""
    found, expected = stored_tensors(ours), stored_tensors(theirs)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        off = (tensor.float() - expected[name]).abs() - rounding * expected[name].abs()
        assert off.max() <= 1e-5 * expected[name].abs().max(), name


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_merges_a_base_in_bf16_in_float32(tmp_path, options):
    """One rounding, that of the cast: each merged value is within half a step of bf16 of the exact sum."""
    save_random(tmp_path / "base", config_of("gemma2"))
    bf16 = load_theirs(tmp_path / "base", dtype=torch.bfloat16)
    bf16.save_pretrained(tmp_path / "bf16")
    ours = write_ours(tmp_path / "bf16", tmp_path / "ours", **options)
    ours.save_merged(tmp_path / "merged")
    bf16.float().save_pretrained(tmp_path / "wide")
    load_peft(tmp_path / "wide", tmp_path / "ours").merge_and_unload().save_pretrained(tmp_path / "exact")
    assert {tensor.dtype for tensor in stored_tensors(tmp_path / "merged").values()} == {torch.bfloat16}
    check_merged(tmp_path / "merged", tmp_path / "exact", rounding=2**-8)


def test_only_one_of_a_tied_pair_is_refused(gemma, tmp_path):
    """PEFT leaves the head at the base's where the embedding alone is trained; ours are one."""
    for name in ("embed_tokens", "lm_head"):
        write_theirs(gemma, tmp_path / name, target_modules=["q_proj"], modules_to_save=[name])
        with pytest.raises(CheckpointError, match=rf"{name}.*tie_word_embeddings"):
            read_adapter(tmp_path / name, meta_model(gemma))


def test_a_tied_pair_that_differs_is_refused(gemma, tmp_path):
    """They were trained apart."""
    write_ours(gemma, tmp_path, modules_to_save=("lm_head",))
    change_tensors(tmp_path, lambda found: found | {"base_model.model.lm_head.weight": torch.ones(97, 32)})
    with pytest.raises(CheckpointError, match="differ.*tie_word_embeddings"):
        read_adapter(tmp_path, meta_model(gemma))


def test_parts_that_see_are_refused_by_name(tmp_path):
    """A vision tower is carried over, so an update of it would be lost."""
    for model_type in ("gemma3", "mistral3"):
        save_random(tmp_path / model_type, config_of(model_type))
        write_theirs(tmp_path / model_type, tmp_path / f"{model_type} adapter", target_modules="all-linear")
        with pytest.raises(CheckpointError, match="'model.(vision_tower|multi_modal_projector).*is not trained here"):
            read_adapter(tmp_path / f"{model_type} adapter", meta_model(tmp_path / model_type))


OTHERS = {
    "another width": ("llama", {"hidden_size": 64}, r"another base.*'model\.layers\.0\.self_attn\.\w_proj'.*64"),
    "fewer layers": (
        "llama",
        {"num_hidden_layers": 2},
        r"another base.*'model\.layers\.2\.\w+\.\w_proj'.*did you mean",
    ),
    "other names": ("gpt2", {}, r"another base.*'model\.layers\.0\.self_attn\.\w_proj'"),
    "other experts": ("mixtral", {"intermediate_size": 40}, "experts'.*another base"),
    "more experts": ("mixtral", {"num_local_experts": 8}, "experts.*another number of experts"),
}


@pytest.mark.parametrize(("model_type", "changes", "message"), OTHERS.values(), ids=OTHERS)
def test_an_adapter_for_another_base_is_refused(llama, tmp_path, model_type, changes, message):
    """The message says so, and names the folder and the first layer that does not fit."""
    base, of = llama, {"targets": ("q_proj", "v_proj"), "modules_to_save": ("norm",)}
    if model_type == "mixtral":
        base, of = tmp_path / "mixtral", {"targets": ("experts",)}
        save_random(base, config_of("mixtral"))
    write_ours(base, tmp_path / "adapter", **of)
    config = config_of(model_type)
    config.update(changes)
    save_random(tmp_path / "other", config)
    with pytest.raises(CheckpointError, match=message) as error:
        read_adapter(tmp_path / "adapter", meta_model(tmp_path / "other"))
    assert error.value.path == tmp_path / "adapter"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_whole_module_of_another_base_is_refused(llama, tmp_path, dtype):
    """A head of another vocabulary, in whatever type."""
    write_ours(llama, tmp_path, modules_to_save=("lm_head",))
    change_tensors(tmp_path, lambda found: found | {"base_model.model.lm_head.weight": torch.ones(98, 32, dtype=dtype)})
    with pytest.raises(CheckpointError, match=r"another base.*'lm_head.weight' is \(98, 32\).*\(97, 32\)"):
        read_adapter(tmp_path, meta_model(llama))


Q = "base_model.model.model.layers.0.self_attn.q_proj"
DAMAGED = {
    "B is gone": (lambda t: {k: v for k, v in t.items() if k != f"{Q}.lora_B.weight"}, "q_proj.lora_B' is missing"),
    "A is gone": (lambda t: {k: v for k, v in t.items() if k != f"{Q}.lora_A.weight"}, "q_proj.lora_A' is missing"),
    "another rank": (
        lambda t: t | {f"{Q}.lora_A.weight": torch.ones(2, 32), f"{Q}.lora_B.weight": torch.ones(32, 2)},
        "has rank 2.*says 3",
    ),
    "ranks that differ": (lambda t: t | {f"{Q}.lora_A.weight": torch.ones(2, 32)}, "q_proj"),
    "something else": (
        lambda t: t | {"base_model.model.model.layers.0.self_attn.qq.weight": torch.ones(1)},
        "'model.layers.0.self_attn.qq.weight'",
    ),
    "nothing": (lambda t: {}, "no tensor of an adapter"),
    "no floats": (lambda t: t | {f"{Q}.lora_A.weight": torch.ones(3, 32, dtype=torch.int8)}, "q_proj.lora_A.*int8"),
    "not finite": (lambda t: t | {f"{Q}.lora_A.weight": torch.full((3, 32), torch.nan)}, "q_proj.lora_A.*not finite"),
    "no matrix": (lambda t: t | {f"{Q}.lora_B.weight": torch.ones(96)}, r"q_proj.lora_B' is \(96,\)"),
    "a misspelt layer": (
        lambda t: t | {f"{Q}x.lora_A.weight": torch.ones(3, 32), f"{Q}x.lora_B.weight": torch.ones(32, 3)},
        "q_projx'.*did you mean 'model.layers.0.self_attn.q_proj'",
    ),
}


@pytest.mark.parametrize(("change", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_adapter_is_refused(llama, tmp_path, change, message):
    """The folder and the tensor are named."""
    write_ours(llama, tmp_path)
    change_tensors(tmp_path, change)
    with pytest.raises(CheckpointError, match=message) as error:
        read_adapter(tmp_path, meta_model(llama))
    assert error.value.path == tmp_path


@pytest.mark.parametrize(
    "options", [{"use_dora": True, "modules_to_save": ("norm",)}, {"targets": ("lm_head", "embed_tokens")}]
)
def test_whatever_the_tensors_are_it_is_read_or_refused(llama, tmp_path, options):
    """Dropped, renamed, of other shapes and types: no error but ours."""
    write_ours(llama, tmp_path, **options)
    model, path = meta_model(llama), tmp_path / "adapter_model.safetensors"
    whole, draw, refused = load_file(path), random.Random(0), 0
    for _ in range(150):
        tensors = dict(whole)
        name = draw.choice(sorted(tensors))
        tensor = tensors.pop(name)
        part, other = (
            draw.choice(["q_proj", "lora_A", "lora_B", "layers", "weight", "."]),
            draw.choice(["", "x", "lora_B"]),
        )
        changed = [
            {},
            {name.replace(part, other, 1): tensor},
            {name: torch.ones([size + draw.choice([0, 1, 5]) for size in tensor.shape])},
            {name: tensor.flatten().clone()},
            {name: torch.tensor(1.0)},
            {name: tensor[None].clone()},
            {name: tensor[:0].clone()},
            {name: tensor.to(torch.int8)},
        ]
        save_file(tensors | draw.choice(changed), path)
        try:
            read_adapter(tmp_path, model)
        except CheckpointError as error:
            assert error.path == tmp_path
            refused += 1
    assert refused > 100


def test_missing_magnitudes_are_refused(llama, tmp_path):
    """A DoRA adapter without the magnitude of a layer would be a plain one there."""
    write_ours(llama, tmp_path, use_dora=True)
    change_tensors(tmp_path, lambda found: {k: v for k, v in found.items() if k != f"{Q}.lora_magnitude_vector"})
    with pytest.raises(CheckpointError, match="q_proj.*magnitude"):
        adapted(llama, adapter=tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"peft_type": "IA3"}, UnsupportedError, "'IA3'"),
        ({"bias": "all"}, UnsupportedError, "bias=all"),
        ({"lora_bias": True}, UnsupportedError, "lora_bias"),
        ({"layer_replication": [[0, 2], [1, 3]]}, UnsupportedError, "layer_replication"),
        ({"trainable_token_indices": [1]}, UnsupportedError, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, UnsupportedError, "init_lora_weights=pissa.*path_initial_model"),
        ({"init_lora_weights": "pissa_niter_4"}, UnsupportedError, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, UnsupportedError, "olora"),
        ({"r": "many"}, CheckpointError, "r: 'many' is no number"),
        ({"lora_alpha": [1]}, CheckpointError, "lora_alpha"),
        ({"rank_pattern": {"q_proj": "x"}}, CheckpointError, "rank_pattern"),
        ({"rank_pattern": [1]}, CheckpointError, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 2.5}}, CheckpointError, "rank_pattern: q_proj: 2.5 is no rank"),
        ({"r": 0}, CheckpointError, "r: 0 is no rank"),
        ({"lora_alpha": "nan"}, CheckpointError, "lora_alpha: nan is not finite"),
        ({"lora_dropout": 1.5}, CheckpointError, "lora_dropout: 1.5"),
        ({"target_parameters": 3}, CheckpointError, "target_parameters: 3"),
        ({"alpha_pattern": {"q_proj": None}}, CheckpointError, "alpha_pattern"),
        ({"alpha_pattern": {"q_(proj": 1}}, CheckpointError, "alpha_pattern.*regular expression"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(llama, tmp_path, changes, error, message):
    """What would compute otherwise, or can't be read, is named."""
    write_ours(llama, tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(error, match=message):
        read_adapter(tmp_path, meta_model(llama))


def test_files_that_are_missing(llama, tmp_path):
    """Which of the two it is."""
    write_ours(llama, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "one" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        read_adapter(tmp_path / "one", meta_model(llama))
    (tmp_path / "two" / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        read_adapter(tmp_path / "two", meta_model(llama))


def test_reads_a_bin_file_and_names_of_memory(llama, tmp_path):
    """As older versions wrote them: `adapter_model.bin`, and `default` in the names."""
    ours = write_ours(llama, tmp_path, modules_to_save=("lm_head",))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    named = {name.replace(".weight", ".default.weight") if "lora_" in name else name: t for name, t in tensors.items()}
    named["base_model.model.lm_head.modules_to_save.weight"] = named.pop("base_model.model.lm_head.weight")
    torch.save(named, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    check_same_logits(adapted(llama, adapter=tmp_path).model, ours.model, share=0)


def test_c078_scales_are_those_that_peft_measures(llama, tmp_path):
    """rsLoRA with patterns: 2.0 in layer 0 and 1.0 in layer 1; in logits and in what is merged too."""
    given = json.loads((CASES / "C078_adapter_config.json").read_text())
    options = {key: given[key] for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")}
    theirs = write_theirs(llama, tmp_path / "theirs", target_modules=given["target_modules"], **options)
    shutil.copy(CASES / "C078_adapter_config.json", tmp_path / "theirs" / "adapter_config.json")
    ours = adapted(llama, adapter=tmp_path / "theirs")
    layers = theirs.base_model.model.model.layers
    measured = {f"model.layers.{i}.self_attn.q_proj": layers[i].self_attn.q_proj.scaling["default"] for i in range(3)}
    found = {name: ours.model.get_submodule(name).scale for name in measured}
    assert found == measured
    assert list(found.values()) == [2.0, 1.0, 2.0]
    check_same_logits(ours.model, theirs)
    ours.save(tmp_path / "ours")
    check_same_logits(load_peft(llama, tmp_path / "ours"), theirs)
    check_same_logits(load_theirs(ours.save_merged(tmp_path / "merged")), theirs)


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({"r": "3", "lora_alpha": "6"}, 2.0),
        ({"lora_alpha": ...}, 8 / 3),
        ({"lora_alpha": None}, 8 / 3),
        ({"lora_alpha": 7.5}, 2.5),
        ({"rank_pattern": None, "alpha_pattern": None}, 5 / 3),
        ({"rank_pattern": {"q_proj": "3"}, "alpha_pattern": {"q_proj": "9"}}, 3.0),
    ],
)
def test_c078_numbers_as_text_or_absent(llama, tmp_path, changes, scale):
    """Text is the number that it says, a key that is left out is PEFT's default: alpha 8."""
    write_ours(llama, tmp_path, targets=("q_proj",))
    change_config(tmp_path, **changes)
    updates = read_adapter(tmp_path, meta_model(llama)).updates
    assert [update.scale for update in updates.values()] == [scale] * 3


def test_c078_an_absent_rank_is_pefts_default(llama, tmp_path):
    """r 8, and alpha 8."""
    ours = write_ours(llama, tmp_path, targets=("q_proj",), rank=8, alpha=8)
    change_config(tmp_path, r=..., lora_alpha=...)
    check_same_logits(adapted(llama, adapter=tmp_path).model, ours.model, share=0)


def test_c079_magnitudes_are_written_as_peft_reads_them(llama, tmp_path):
    """No `.weight` at the end; fresh ones are the lengths of the base's rows; merging keeps them."""
    fresh = adapted(llama, LoRAConfig(rank=3, alpha=5.0, targets=("q_proj",), use_dora=True))
    found = load_file(fresh.save(tmp_path / "fresh") / "adapter_model.safetensors")
    base = stored_tensors(llama)
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.q_proj"
        norms = base[f"{name}.weight"].norm(dim=1)
        torch.testing.assert_close(found[f"base_model.model.{name}.lora_magnitude_vector"], norms)
    assert len(found) == 9
    trained = write_ours(llama, tmp_path / "trained", targets=("q_proj",), use_dora=True)
    check_same_logits(load_peft(llama, tmp_path / "trained"), trained.model)
    check_same_logits(load_theirs(trained.save_merged(tmp_path / "merged")), trained.model)


def test_c084_the_file_holds_what_vllm_and_llama_cpp_read(llama, tmp_path):
    """The names of seven linear layers a layer and nothing else; a config with every field, and no null among them."""
    write_ours(llama, tmp_path)
    layers = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        f"base_model.model.model.layers.{index}.{part}.{name}.lora_{factor}.weight"
        for index in range(3)
        for part, names in layers.items()
        for name in names
        for factor in "AB"
    }
    config = config_in(tmp_path)
    assert sorted(config["target_modules"]) == sorted(name for names in layers.values() for name in names)
    expected = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(llama)}
    expected |= {"r": 3, "lora_alpha": 5, "bias": "none", "use_rslora": False, "use_dora": False, "lora_dropout": 0.0}
    expected |= {"fan_in_fan_out": False, "inference_mode": True, "rank_pattern": {}, "alpha_pattern": {}}
    assert config.items() >= expected.items()
    # vLLM takes no modules_to_save but null; llama.cpp and others read these as numbers.
    assert config["modules_to_save"] is None
    assert {type(config["r"]), type(config["lora_alpha"])} == {int}
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_c084_modules_to_save_have_their_own_names(llama, tmp_path):
    """`base_model.model.lm_head.weight`, as PEFT writes it."""
    write_ours(llama, tmp_path / "ours", modules_to_save=("lm_head",))
    write_theirs(llama, tmp_path / "theirs", target_modules="all-linear", modules_to_save=["lm_head"])
    ours, theirs = (set(load_file(tmp_path / side / "adapter_model.safetensors")) for side in ("ours", "theirs"))
    assert ours == theirs
    assert "base_model.model.lm_head.weight" in ours


def test_c084_gpt2_says_how_its_weights_lie(tmp_path):
    """`fan_in_fan_out`, which other readers go by."""
    save_random(tmp_path / "base", config_of("gpt2"))
    write_ours(tmp_path / "base", tmp_path / "ours")
    assert config_in(tmp_path / "ours")["fan_in_fan_out"] is True
