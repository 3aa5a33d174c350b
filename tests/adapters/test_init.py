"""What an adapter begins as: distributions, and the factors of PiSSA and LoftQ against singular values and PEFT."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from tests.adapters.peft_oracle import (
    adapted,
    check_same_logits,
    disturb,
    load_peft,
    load_theirs,
)
from tests.adapters.same_steps import check_same_steps, of_all
from tests.models.oracle import save_random, stored_tensors
from tests.models.support import config_of
from torchtune.adapters.adapter import adapter_of
from torchtune.adapters.config import LoRAConfig
from torchtune.adapters.init import factors
from torchtune.adapters.lora import LoRALinear
from torchtune.quantization.kinds import packable, packer


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A base of each layout of weights."""
    folder = tmp_path_factory.mktemp("bases")
    for model_type in ("llama", "gpt2", "mixtral"):
        save_random(folder / model_type, config_of(model_type))
    return folder


def lora_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def in_parts(layer):
    """W, B A scaled, each [out, in], in float64."""
    weight = layer.weight.T if layer.transposed else layer.weight
    return weight.double(), layer.scale * layer.lora_B.weight.double() @ layer.lora_A.weight.double()


@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_distributions_are_pefts(bases, init):
    """A uniform within 1 / sqrt(in), or normal with deviation 1 / r; B zero. An embedding's the other way round."""
    targets = ["down_proj", "q_proj", "embed_tokens"]
    config = LoraConfig(r=8, target_modules=targets, init_lora_weights=init if init == "gaussian" else True)
    theirs = get_peft_model(load_theirs(bases / "llama"), config).state_dict()
    ours = adapted(bases / "llama", LoRAConfig(rank=8, targets=tuple(targets), init=init)).model.state_dict()
    names = [name for name in ours if "lora_" in name]
    assert len(names) == 2 * (3 + 3 + 1)
    for name in names:
        value, expected = ours[name], theirs[in_peft(name)]
        assert value.shape == expected.shape
        assert value.std().item() == pytest.approx(expected.std().item(), rel=0.2), name
        if init == "default" and "lora_A" in name:
            bound = 1 / math.sqrt(value.shape[1])
            assert 0.9 * bound < value.abs().max() <= bound
            assert 0.9 * bound < expected.abs().max() <= bound


def in_peft(name):
    """A parameter's name in PEFT's memory."""
    if name.endswith(".weight"):
        return f"base_model.model.{name.removesuffix('weight')}default.weight"
    return f"base_model.model.{name}.default"


def test_the_seed_decides(bases):
    """The same seed the same adapter, another another."""
    config = LoRAConfig(rank=4, targets=("all-linear", "experts", "gate"))
    one, again, other = (adapter_of(adapted(bases / "mixtral", config, seed=seed).model, config) for seed in (0, 0, 1))
    assert len(one.updates) == 3 * (4 + 2 + 1)
    for name, update in one.updates.items():
        assert update.a.equal(again.updates[name].a)
        assert not update.a.equal(other.updates[name].a)
        assert not update.b.any()


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9)])
def test_factors_are_the_best_approximation(shape):
    """Of a rank, by the singular values (Eckart and Young), their root on each side."""
    matrix = torch.randn(shape, dtype=torch.float64)
    a, b = factors(matrix, 3, 0.7)
    singular = torch.linalg.svdvals(matrix)
    left = torch.linalg.svdvals(matrix - 0.7 * b @ a)
    torch.testing.assert_close(left[: len(singular) - 3], singular[3:])
    torch.testing.assert_close(left[len(singular) - 3 :], torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))
    torch.testing.assert_close(0.7 * a.norm(dim=1).square(), singular[:3])


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_pissa_begins_with_the_largest_singular_vectors(bases, model_type):
    """The base keeps the rest, and together they are what the base was."""
    stored = stored_tensors(bases / model_type)
    ours = adapted(bases / model_type, LoRAConfig(rank=4, alpha=6.0, init="pissa", rank_pattern={r".*\.1\..*": 2}))
    check_same_logits(ours.model, load_theirs(bases / model_type))
    for name, layer in lora_layers(ours.model).items():
        weight, update = in_parts(layer)
        whole = stored[f"{name}.weight"].double()
        torch.testing.assert_close(weight + update, whole.T if layer.transposed else whole, rtol=0, atol=1e-6)
        rank = 2 if ".1." in name else 4
        singular = torch.linalg.svdvals(whole)
        torch.testing.assert_close(
            torch.linalg.svdvals(update)[: rank + 1], torch.cat((singular[:rank], torch.zeros(1))), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(torch.linalg.svdvals(weight)[0], singular[rank], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "optimizer"), [("llama", torch.optim.AdamW), ("llama", torch.optim.SGD), ("gpt2", torch.optim.SGD)]
)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_pissa_trains_as_pefts(bases, tmp_path, model_type, optimizer, use_rslora):
    """Losses over 20 steps; and what is saved, of twice the rank, is on the published base what was trained."""
    ours = adapted(bases / model_type, LoRAConfig(rank=4, alpha=6.0, init="pissa", use_rslora=use_rslora))
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights="pissa", use_rslora=use_rslora
    )
    theirs = get_peft_model(load_theirs(bases / model_type), config).eval()
    build = of_all(lambda parameters: optimizer(parameters, lr=2e-3))
    check_same_steps(ours.model, theirs, (build, build))
    check_same_logits(ours.model, theirs, share=1e-4)
    found = load_file(ours.save(tmp_path / "saved") / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in found.items() if "lora_A" in name} == {8}
    on_base = load_peft(bases / model_type, tmp_path / "saved")
    check_same_logits(on_base, ours.model)
    check_same_logits(load_theirs(ours.save_merged(tmp_path / "merged")), ours.model)
    check_same_logits(adapted(bases / model_type, adapter=tmp_path / "saved").model, ours.model)


def test_pissa_goes_on_from_its_file(bases, tmp_path):
    """A resumed run has the beginning's factors and the same base again."""
    config = LoRAConfig(rank=4, alpha=6.0, init="pissa")
    ours = adapted(bases / "llama", config)
    disturb(ours.model)
    ours.save(tmp_path)
    again = adapted(bases / "llama", config, resumed=tmp_path)
    check_same_logits(again.model, ours.model, share=0)
    for name, layer in lora_layers(again.model).items():
        before = ours.model.get_submodule(name)
        assert layer.weight.equal(before.weight)
        assert layer.lora_A.weight.equal(before.lora_A.weight)
        assert all(mine.equal(theirs) for mine, theirs in zip(layer.initial, before.initial, strict=True))


def test_pissas_file_of_a_large_rank_is_read(bases, tmp_path):
    """Twice the rank may be more than the matrix has."""
    ours = adapted(bases / "llama", LoRAConfig(rank=12, alpha=6.0, init="pissa", targets=("k_proj",)))
    disturb(ours.model)
    ours.save(tmp_path)
    check_same_logits(adapted(bases / "llama", adapter=tmp_path).model, ours.model)
    check_same_logits(load_peft(bases / "llama", tmp_path), ours.model)


def quantised(bases, model_type, kind, **options):
    """An adapter over a packed base."""
    config = LoRAConfig(**{"rank": 4, "alpha": 6.0, **options})
    return adapted(bases / model_type, config, quantisation=(packer(kind), packable))


@pytest.mark.parametrize("kind", ["nf4", "int8", "int4"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_loftq_makes_up_for_what_quantising_lost(bases, kind, model_type):
    """B A is the best approximation of it, and the packed base is the one of every other adapter."""
    ours = quantised(bases, model_type, kind, init="loftq")
    plain = quantised(bases, model_type, kind)
    stored = stored_tensors(bases / model_type)
    for name, layer in lora_layers(ours.model).items():
        weight = layer.weight.dense(torch.float32)
        assert weight.equal(plain.model.get_submodule(name).weight.dense(torch.float32))
        lost = stored[f"{name}.weight"] - weight
        lost = lost.T if layer.transposed else lost
        update = layer.scale * layer.lora_B.weight @ layer.lora_A.weight
        singular = torch.linalg.svdvals(lost)
        torch.testing.assert_close(torch.linalg.svdvals(lost - update)[0], singular[4], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(torch.linalg.svdvals(update)[:4], singular[:4], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["nf4", "int8", "int4"])
@pytest.mark.parametrize("init", ["default", "loftq", "pissa"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_merging_over_a_packed_base(bases, tmp_path, kind, init, model_type):
    """The merged model is what was trained: the packed base, and the adapter."""
    ours = quantised(bases, model_type, kind, init=init)
    disturb(ours.model)
    check_same_logits(load_theirs(ours.save_merged(tmp_path / "merged")), ours.model)


def test_dora_over_a_packed_base(bases, tmp_path):
    """Fresh magnitudes are the lengths of the packed rows."""
    ours = quantised(bases, "llama", "nf4", use_dora=True)
    for layer in lora_layers(ours.model).values():
        torch.testing.assert_close(layer.lora_magnitude_vector, layer.weight.dense(torch.float32).norm(dim=1))
    disturb(ours.model)
    check_same_logits(load_theirs(ours.save_merged(tmp_path / "merged")), ours.model)


def test_experts_over_a_packed_base(bases, tmp_path):
    """Stacks are packed matrix by matrix and merged so."""
    ours = quantised(bases, "mixtral", "nf4", targets=("all-linear", "experts", "gate"))
    disturb(ours.model)
    check_same_logits(load_theirs(ours.save_merged(tmp_path / "merged")), ours.model)
