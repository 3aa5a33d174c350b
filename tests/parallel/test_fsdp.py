"""FSDP: the sums and norms of one device, whichever rank has which tokens."""

import copy

import pytest
import torch
import torch.distributed as dist

from torchtune.distributed.mesh import MeshSizes, open_mesh
from torchtune.distributed.part import is_sharded, local, parts
from torchtune.models.build import build_model
from torchtune.modules.documents import Documents
from torchtune.modules.losses import LinearCrossEntropy
from torchtune.parallel.fsdp import apply_fsdp, defer_sums, reshard
from torchtune.parallel.gradients import GradientSums
from torchtune.training.activation_checkpointing import apply_activation_checkpointing
from torchtune.training.precision import autocast
from torchtune.training.stepped import SteppedParameters

LLAMA = {
    "model_type": "llama",
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "attention_bias": True,
}
QWEN3_MOE = LLAMA | {
    "model_type": "qwen3_moe",
    "head_dim": 8,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
CONFIGS = {"llama": LLAMA, "tied": LLAMA | {"tie_word_embeddings": True}, "qwen3_moe": QWEN3_MOE}


def model_of(name):
    torch.manual_seed(0)
    model = build_model(CONFIGS[name])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch_of(rank):
    """Documents of other lengths on each rank; the last rank has no trained token."""
    lengths = [3 + rank, 5, 2 * rank + 1]
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(37, (sum(lengths),), generator=generator)
    labels = torch.where(torch.rand(len(ids), generator=generator) < 0.6, ids.roll(-1), -100)
    if rank == dist.get_world_size() - 1:
        labels[:] = -100
    return ids, Documents.from_lengths(lengths), labels


def backward(model, batches, dtype):
    total = 0.0
    with autocast(model, dtype):
        for ids, documents, labels in batches:
            loss = model(ids, documents, labels=labels, loss=LinearCrossEntropy(4))
            loss.backward()
            total += loss.detach()
    return total


def compare(name, sizes, dtype, tolerance, **options):
    with open_mesh(sizes, torch.device("cpu")) as mesh:
        model = model_of(name)
        if dtype == torch.float64:
            model.double()
        alone = copy.deepcopy(model)
        if options.pop("checkpointed", False):
            apply_activation_checkpointing(model.model.layers)
        sums_once, own_loss = options.pop("sums_once", False), 0.0
        apply_fsdp(model, mesh, dtype=dtype, **options)
        stepped = SteppedParameters(model)
        for last in (False, True):  # accumulated
            defer_sums(model, sums_once and not last)
            own_loss = own_loss + backward(model, [batch_of(dist.get_rank())], dtype)
        loss = mesh.tokens.sum(own_loss)
        stepped.take_gradients()
        sums = GradientSums(model, mesh)
        sums.sum(stepped.by_name)
        norm = sums.norm(stepped.by_name, torch.device("cpu"))

        batches = [batch_of(rank) for rank in range(dist.get_world_size())] * 2
        torch.testing.assert_close(loss, backward(alone, batches, dtype), rtol=tolerance, atol=tolerance)
        own = SteppedParameters(alone).by_name
        flat = torch.cat([p.grad.flatten().double() for p in own.values()]).norm()
        torch.testing.assert_close(norm.double(), flat, rtol=10 * tolerance + 1e-6, atol=0)
        for parameter_name, part in parts(model).items():
            if parameter_name not in own:
                continue
            whole, held = own[parameter_name].grad, stepped.by_name[parameter_name].grad
            assert (held - part.of(whole)).norm() <= tolerance * flat, parameter_name
        stepped.forget_gradients()
        assert all(parameter.grad is None for parameter in model.parameters())


SIZES = [MeshSizes(), MeshSizes(replicate=2), MeshSizes(replicate=4)]


def many(num_ranks):
    for name in CONFIGS:
        for sizes in SIZES:
            if num_ranks % sizes.replicate == 0:
                compare(name, sizes, torch.float64, 1e-10)
    compare("llama", MeshSizes(), torch.float64, 1e-10, reshard_after_forward=False)
    compare("llama", MeshSizes(), torch.float64, 1e-10, checkpointed=True)
    for name in CONFIGS:
        compare(name, MeshSizes(), torch.float64, 1e-10, sums_once=True)
    compare("llama", MeshSizes(replicate=2), torch.float64, 1e-10, sums_once=True)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_gradients_are_those_of_one_device(request, num_ranks):
    """FSDP, HSDP and copies; accumulated; a rank without a trained token; tied, and experts that not all ranks use."""
    request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[num_ranks]).run(many, num_ranks)


def half_precision():
    for name in CONFIGS:
        compare(name, MeshSizes(), torch.bfloat16, 2e-2)
        compare(name, MeshSizes(), torch.bfloat16, 2e-2, sums_once=True)


def test_in_half_precision_only_the_order_of_sums_differs(two_ranks):
    """What is computed in bf16 is what one device casts to it; vectors and routers stay in float32 on both."""
    two_ranks.run(half_precision)


def shards():
    with open_mesh(MeshSizes(), torch.device("cpu")) as mesh:
        model = model_of("qwen3_moe")
        wholes = {name: p.detach().clone() for name, p in model.named_parameters()}
        apply_fsdp(model, mesh, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            assert is_sharded(parameter) == (wholes[name].dim() > 1 and not name.endswith("mlp.gate.weight")), name
        with torch.no_grad():
            model(*batch_of(0)[:2])
        reshard(model)
        for name, part in parts(model).items():
            torch.testing.assert_close(local(model.get_parameter(name).detach()), part.of(wholes[name]))


def test_every_matrix_is_shared_and_vectors_are_not(two_ranks):
    """Also after a forward pass alone, whose gathered layers are let go of."""
    two_ranks.run(shards)
