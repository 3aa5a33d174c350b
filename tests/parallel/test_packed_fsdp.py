"""QLoRA under FSDP: each rank holds its rows of the packed base, and the numbers are those of one device."""

import json

import pytest
import torch
from safetensors.torch import save_file

from torchtune.adapters.base_weights import BaseWeights
from torchtune.adapters.config import LoRAConfig
from torchtune.adapters.init import allocate_lora, init_lora
from torchtune.adapters.lora import apply_lora
from torchtune.checkpoint.open import open_checkpoint
from torchtune.distributed.mesh import Mesh, MeshSizes, open_mesh
from torchtune.distributed.part import is_sharded, local, parts
from torchtune.models.build import build_model
from torchtune.modules.documents import Documents
from torchtune.modules.losses import LinearCrossEntropy
from torchtune.modules.packed import PackedWeight, unpacked
from torchtune.modules.stored import as_stored, stored_tensors
from torchtune.parallel.expert_parallel import apply_expert_parallel
from torchtune.parallel.fsdp import apply_fsdp, reshard
from torchtune.parallel.gradients import GradientSums
from torchtune.parallel.tensor_parallel import apply_tensor_parallel
from torchtune.quantization.kinds import KINDS, packable, packer
from torchtune.training.activation_checkpointing import apply_activation_checkpointing
from torchtune.training.compiling import apply_compile
from torchtune.training.precision import autocast
from torchtune.training.stepped import SteppedParameters

# Halves of a half are whole blocks of 128 values in every matrix, by rows or by columns.
LLAMA = {
    "model_type": "llama",
    "vocab_size": 37,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
QWEN3_MOE = LLAMA | {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
CONFIGS = {
    "llama": LLAMA,
    "qwen3_moe": QWEN3_MOE,
    "uneven": QWEN3_MOE | {"hidden_size": 96, "num_experts": 3, "num_key_value_heads": 1, "head_dim": 34},
}
ALONE = Mesh()
CPU = torch.device("cpu")
NUM_TRAINED = 24  # whatever: one number for all ranks


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A checkpoint of each config."""
    folder = tmp_path_factory.mktemp("bases")
    for name, config in CONFIGS.items():
        (folder / name).mkdir()
        torch.manual_seed(0)
        model = build_model(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        tensors = {name: tensor.detach().contiguous() for name, tensor in as_stored(model, stored_tensors(model))}
        save_file(tensors, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


def build(folder, mesh, *, kind, double=False, dtype=torch.float64, dora=False, transform=None, **options):
    """The model as the recipe makes it; and which of its packed weights are whole on each rank."""
    checkpoint = open_checkpoint(folder)
    with torch.device("meta"):
        model = build_model(checkpoint.config)
    config = LoRAConfig(rank=4, alpha=16.0, use_dora=dora)
    apply_lora(model, config)
    apply_tensor_parallel(model, mesh.tensor)
    apply_expert_parallel(model, mesh.expert)
    if transform is not None:
        transform(model.model.layers)
    names = packable(model)
    whole = apply_fsdp(model, mesh, dtype=dtype, packed=names, block=KINDS[kind].block, **options)
    trained_dtype = torch.promote_types(dtype, torch.float32)
    allocate_lora(model, device="cpu", dtype=trained_dtype)
    torch.manual_seed(3)
    init_lora(model)
    base = BaseWeights(
        model,
        dtype=dtype,
        trained_dtype=trained_dtype,
        pack=packer(kind, double_quantization=double),
        packable=names,
        fresh=config.init,
    )
    checkpoint.load_into(model, place=base)
    return model.train(), whole


def batch_of(rank):
    lengths = [3, 5, 4]
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(37, (sum(lengths),), generator=generator)
    labels = torch.where(torch.rand(len(ids), generator=generator) < 0.6, ids.roll(-1), -100)
    return ids, Documents.from_lengths(lengths), labels


def loss_of(model, batches, *, backward):
    total = 0.0
    for ids, documents, labels in batches:
        loss = model(ids, documents, labels=labels, loss=LinearCrossEntropy(4)) / NUM_TRAINED
        if backward:
            loss.backward()
        total += loss.detach()
    return total


def train(model, mesh, batches, dtype):
    """Five steps of SGD, and a look at the loss in between; the losses, the norms, and the adapter at the end."""
    stepped, sums = SteppedParameters(model), GradientSums(model, mesh)
    optimizer = torch.optim.SGD(stepped.by_name.values(), lr=1.0)
    losses, norms = [], []
    for step in range(5):
        with autocast(model, dtype):
            losses.append(loss_of(model, batches, backward=True))
        stepped.take_gradients()
        sums.sum(stepped.by_name)
        gradients = [parameter.grad for parameter in stepped.by_name.values()]
        norms.append(sums.norm(stepped.by_name, CPU) if mesh is not ALONE else torch.nn.utils.get_total_norm(gradients))
        optimizer.step()
        stepped.forget_gradients()
        if step == 2:
            with torch.no_grad(), autocast(model, dtype):
                losses.append(loss_of(model, batches, backward=False))
            reshard(model)
    adapter = {name: parameter.detach() for name, parameter in stepped.by_name.items()}
    return mesh.tokens.sum(torch.stack(losses)), torch.stack(norms), adapter


def compare(folder, sizes, tolerance, *, dtype=torch.float64, **options):
    """Train on the ranks and alone. Returns how much of the base's packed bytes this rank held."""
    with open_mesh(sizes, CPU) as mesh:
        model, _ = build(folder, mesh, dtype=dtype, **options)
        held = bytes_of(model)
        losses, norms, adapter = train(model, mesh, [batch_of(mesh.data.rank)], dtype)
        for only_shared in ("reshard_after_forward", "transform"):
            options.pop(only_shared, None)
        alone, _ = build(folder, ALONE, dtype=dtype, **options)
        expected, expected_norms, whole = train(alone, ALONE, [batch_of(rank) for rank in range(mesh.data.size)], dtype)
        assert expected[0] > expected[-1] + 0.01  # it learns
        torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance)
        # Norms are float32, whatever gradients are.
        torch.testing.assert_close(norms.float(), expected_norms.float(), rtol=max(tolerance, 1e-6), atol=0)
        of_rank = parts(model)
        for name, values in adapter.items():
            torch.testing.assert_close(values, of_rank[name].of(whole[name]), rtol=tolerance, atol=tolerance, msg=name)
        return held / bytes_of(alone)


def bytes_of(model):
    return sum(held.held_bytes for held in map(local, model.parameters()) if isinstance(held, PackedWeight))


def two_ways(folder, kind):
    half = pytest.approx(1 / 2, rel=1e-6)
    for base in ("llama", "qwen3_moe"):
        assert compare(folder / base, MeshSizes(), 1e-9, kind=kind) == half
    llama = folder / "llama"
    assert compare(llama, MeshSizes(), 1e-9, kind=kind, dora=True) == half
    assert compare(llama, MeshSizes(), 1e-9, kind=kind, reshard_after_forward=False) == half
    assert compare(llama, MeshSizes(), 1e-9, kind=kind, transform=apply_activation_checkpointing) == half
    assert compare(llama, MeshSizes(), 1e-5, kind=kind, dtype=torch.float32) == half
    # What is computed is rounded alike; sums of gradients over ranks are not.
    assert compare(llama, MeshSizes(), 2e-2, kind=kind, dtype=torch.bfloat16) == half


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_as_one_device(two_ranks, bases, kind):
    """Of a rank's rows no value is quantised otherwise: losses, norms and adapters are the same, in half the memory."""
    two_ranks.run(two_ways, bases, kind)


def four_ways(folder, kind):
    quarter = pytest.approx(1 / 4, rel=1e-6)
    llama, moe = folder / "llama", folder / "qwen3_moe"
    assert compare(llama, MeshSizes(), 1e-9, kind=kind) == quarter
    assert compare(moe, MeshSizes(), 1e-9, kind=kind) == quarter
    assert compare(llama, MeshSizes(replicate=2), 1e-9, kind=kind) == pytest.approx(1 / 2, rel=1e-6)
    assert compare(llama, MeshSizes(tensor=2), 1e-9, kind=kind) == quarter
    assert compare(moe, MeshSizes(expert=2), 1e-9, kind=kind) == quarter
    assert compare(moe, MeshSizes(expert=4), 1e-9, kind=kind) == quarter


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", KINDS)
def test_four_ranks_train_as_one_device(four_ranks, bases, kind):
    """FSDP alone, over replicas, and over what tensor and expert parallelism have left."""
    four_ranks.run(four_ways, bases, kind)


def double_quantised(folder):
    compare(folder / "llama", MeshSizes(), 1e-3, kind="nf4", double=True)
    with open_mesh(MeshSizes(), CPU) as mesh:
        stored = open_checkpoint(folder / "qwen3_moe")
        (model, _), (alone, _) = [build(folder / "qwen3_moe", m, kind="nf4", double=True) for m in (mesh, ALONE)]
        of_rank, read = parts(model), stored.reader(model)
        for name in packable(model):
            held = unpacked(local(model.get_parameter(name)), torch.float32)
            whole = of_rank[name].of(unpacked(alone.get_parameter(name), torch.float32))
            if held.dim() == 3:
                assert torch.equal(held, whole)
            else:
                lost = (whole - of_rank[name].of(read(name))).norm()
                assert 0 < (held - whole).norm() < 0.1 * lost


def test_doubly_quantised_scales_are_those_of_a_ranks_rows(two_ranks, bases):
    """They are rounded around the mean of a rank's own, so a matrix differs by less than NF4 loses; experts do not."""
    two_ranks.run(double_quantised, bases)


def uneven(folder):
    with open_mesh(MeshSizes(), CPU) as mesh:
        model, whole = build(folder / "uneven", mesh, kind="nf4")
        # 3 experts; and 34 rows of keys and values, of which half are no whole blocks, as those of queries are.
        names = {name.removeprefix("model.layers.0.").removesuffix(".weight") for name in whole if ".0." in name}
        assert names == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj", "self_attn.k_proj", "self_attn.v_proj"}
        for name, parameter in model.named_parameters():
            assert is_sharded(parameter) == (parameter.dim() > 1 and name not in whole and "mlp.gate." not in name), (
                name
            )
    compare(folder / "uneven", MeshSizes(), 1e-9, kind="nf4")


def test_what_does_not_divide_stays_whole(two_ranks, bases):
    """It is named, and the numbers are the same."""
    two_ranks.run(uneven, bases)


def compiled(folder):
    compare(folder / "llama", MeshSizes(), 1e-9, kind="nf4", transform=apply_compile)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_compiled_layers_compute_with_what_was_gathered(two_ranks, bases):
    """A compiled layer gets its weights anew each time, in memory that was given back in between."""
    two_ranks.run(compiled, bases, timeout_s=220)
