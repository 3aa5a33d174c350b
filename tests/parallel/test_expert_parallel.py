"""Experts on several ranks, against the model on one device and the batch of all ranks."""

from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from torchtune.adapters.config import LoRAConfig
from torchtune.adapters.lora import apply_lora
from torchtune.distributed.mesh import Axis, MeshSizes, open_mesh
from torchtune.distributed.part import part_of, parts
from torchtune.errors import ConfigError
from torchtune.models.build import build_model
from torchtune.modules.documents import Documents
from torchtune.modules.moe import Experts, Router
from torchtune.parallel.expert_parallel import (
    apply_expert_parallel,
    check_expert_parallel,
    expert_parameters,
)
from torchtune.parallel.gradients import GradientSums
from torchtune.training.activation_checkpointing import apply_activation_checkpointing
from torchtune.training.compiling import apply_compile

SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "rope_theta": 1e4,
}
MIXTRAL = {**SIZES, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 12,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
}
FAMILIES = {
    "mixtral": MIXTRAL,  # gate and up apart on disk
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},  # transposed, with biases
    "deepseek_v3": LATENT,  # a dense layer, a shared expert, a correction of the choice
    "llama4_text": {  # tokens weighed before their experts
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "intermediate_size_mlp": 20,
        "attention_chunk_size": 7,
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
LENGTHS = ([5, 3], [9], [2], [6, 1])  # documents of each rank


class Skew(nn.Module):
    """A router's update that sends every token to the experts of the largest numbers."""

    def forward(self, x):
        return 50.0 * torch.arange(4.0, dtype=x.dtype).expand(len(x), -1)


def random_model(config, *, skewed=False, lora=None):
    """The same on all ranks, random everywhere, in float64."""
    torch.manual_seed(0)
    model = build_model(config)
    if lora is not None:
        apply_lora(model, lora)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    for router in [module for module in model.modules() if isinstance(module, Router)] if skewed else []:
        router.update = Skew()
    return model.double()


def loss_and_gradients(model, lengths, labels, ids):
    loss = model(ids, Documents.from_lengths(lengths), labels=labels)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def batch(lengths, *, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 31, (sum(lengths),), generator=generator)
    labels = torch.randint(0, 31, (sum(lengths),), generator=generator)
    return ids, torch.where(torch.rand(len(ids), generator=generator) < 0.7, labels, -100)


def as_on_one_device(config, size, *, lengths=LENGTHS, trains=(0, 1, 2, 3), transform=None, **options):
    """Loss and gradients of experts dealt to `size` ranks are those of the model on one device.

    Args:
        lengths: documents of each rank.
        trains: ranks with trained tokens.
        transform: what is done to the model after the experts were dealt.
    """
    num_ranks, me = dist.get_world_size(), dist.get_rank()
    whole = random_model(config, **options)
    model = deepcopy(whole)
    batches = [batch(lengths[rank], seed=rank) for rank in range(num_ranks)]
    batches = [(ids, labels if rank in trains else labels * 0 - 100) for rank, (ids, labels) in enumerate(batches)]
    ids, labels = (torch.cat(each) for each in zip(*batches, strict=True))
    expected, gradients = loss_and_gradients(whole, [n for each in lengths[:num_ranks] for n in each], labels, ids)
    with open_mesh(MeshSizes(expert=size), torch.device("cpu")) as mesh:
        apply_expert_parallel(model, mesh.expert)
        if transform is not None:
            transform(model.model.layers)
        loss, found = loss_and_gradients(model, lengths[me], batches[me][1], batches[me][0])
        torch.testing.assert_close(mesh.tokens.sum(loss), expected)
        of_experts = {id(parameter) for parameter in expert_parameters(model)}
        assert found.keys() == gradients.keys()
        assert all(gradient is not None for gradient in found.values()), "each rank has one of each"
        trained = {name: model.get_parameter(name) for name in found}
        sums = GradientSums(model, mesh)
        sums.sum(trained)
        held = parts(model)
        for name, parameter in trained.items():
            assert (id(parameter) in of_experts) == (not held[name].is_whole)
            expected = held[name].of(gradients[name])
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-9, msg=name)
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        torch.testing.assert_close(sums.norm(trained, torch.device("cpu")).double(), norm, rtol=1e-6, atol=0)


def _families(size):
    for name, config in FAMILIES.items():
        as_on_one_device({**SIZES, "model_type": name, **config}, size)


def test_every_kind_of_experts_on_two_ranks(two_ranks):
    two_ranks.run(_families, 2)


@pytest.mark.parametrize("size", [2, 4])
def test_every_kind_of_experts_on_four_ranks(four_ranks, size):
    """Two ranks share the experts and two pairs have the same, or all share them."""
    four_ranks.run(_families, size)


def _uneven(size):
    as_on_one_device(MIXTRAL, size, skewed=True)
    as_on_one_device(MIXTRAL, size, skewed=True, transform=apply_activation_checkpointing)
    as_on_one_device(MIXTRAL, size, lengths=([4], [], [7, 2], []), trains=(0, 2))
    as_on_one_device(MIXTRAL, size, trains=(1,))


def test_no_load_is_too_uneven(two_ranks, four_ranks):
    """All tokens on the last two experts; ranks without a token, and without a trained one: no hang, right numbers."""
    two_ranks.run(_uneven, 2)
    four_ranks.run(_uneven, 4)


def _adapted(size):
    every = ("experts.gate_up_proj", "experts.down_proj", "q_proj", "gate")
    as_on_one_device(MIXTRAL, size, lora=LoRAConfig(rank=2, targets=every))
    # Nothing before the last layer's experts is trained: no gradient goes back through the first exchange.
    only = LoRAConfig(rank=2, targets=("layers.1.block_sparse_moe.experts.down_proj",))
    as_on_one_device(MIXTRAL, size, lora=only)
    as_on_one_device(MIXTRAL, size, lora=only, transform=apply_activation_checkpointing)
    gpt_oss = {**SIZES, "model_type": "gpt_oss", **FAMILIES["gpt_oss"]}
    as_on_one_device(gpt_oss, size, lora=LoRAConfig(rank=2, targets=("experts.gate_up_proj", "experts.down_proj")))


def test_adapters_on_experts(two_ranks):
    two_ranks.run(_adapted, 2)


def _compiled():
    as_on_one_device({**MIXTRAL, "num_hidden_layers": 1}, 2, transform=apply_compile)


def test_layers_compile_around_the_exchange(two_ranks):
    two_ranks.run(_compiled, timeout_s=120)  # most of it is the compiler's


def test_a_rank_has_its_experts_from_the_meta_device_on():
    """Which are which is noted for whoever reads weights; what was split before stays so."""
    with torch.device("meta"):
        model = build_model(MIXTRAL)
    apply_expert_parallel(model, Axis(size=2, rank=1))
    experts = next(module for module in model.modules() if isinstance(module, Experts))
    assert experts.gate_up_proj.is_meta
    assert experts.gate_up_proj.shape == part_of(experts, "gate_up_proj").shape == (2, 24, 16)
    assert part_of(experts, "gate_up_proj").ranges == (((2, 4),), ((0, 24),), ((0, 16),))


@pytest.mark.parametrize(
    ("config", "size", "said"),
    [
        (MIXTRAL, 3, "3 does not divide the 4 experts of a layer; use one of 1, 2, 4"),
        ({**SIZES, "model_type": "llama"}, 2, "2, but this model has no experts"),
    ],
)
def test_what_can_not_be_dealt_is_refused(config, size, said):
    with torch.device("meta"):
        model = build_model(config)
    with pytest.raises(ConfigError) as error:
        check_expert_parallel(model, size)
    (problem,) = error.value.problems
    assert problem.key == "expert_parallel"
    assert said in problem.message
    check_expert_parallel(model, 1)
