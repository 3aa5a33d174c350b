"""Adapters over a base of which each rank has a part: what one device begins with, in parts."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_config
from torchtune.adapters.adapter import adapter_of, fill
from torchtune.adapters.base_weights import BaseWeights
from torchtune.adapters.config import LoRAConfig
from torchtune.adapters.init import allocate_lora, init_lora
from torchtune.adapters.lora import LoRALinear, apply_lora
from torchtune.checkpoint.open import open_checkpoint
from torchtune.distributed.part import Part, local, parts, set_part
from torchtune.errors import UnsupportedError
from torchtune.models.build import build_model
from torchtune.modules.packed import PackedWeight
from torchtune.quantization.kinds import packable, packer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    # Rows and columns of 128, so that blocks of 64 values fit into halves of them.
    config = tiny_config(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, vocab_size=400, tie_word_embeddings=False
    )
    return save_tiny_checkpoint(tmp_path_factory.mktemp("base") / "model", config)


def by_hand(model, rank, size):
    """What tensor parallelism splits: q, k, v, gate and up by rows with their B, o and down by columns with their A."""
    for path, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            dim = 1 if path.endswith(("o_proj", "down_proj")) else 0
            cut(layer, "weight", dim, rank, size)
            cut(layer.lora_A if dim else layer.lora_B, "weight", dim, rank, size)
            if layer.lora_magnitude_vector is not None and dim == 0:
                cut(layer, "lora_magnitude_vector", 0, rank, size)


def cut(module, name, dim, rank, size):
    parameter = getattr(module, name)
    part = Part.all_of(parameter.shape).take(dim, rank, size)
    shape = torch.empty(part.shape, device="meta")
    setattr(module, name, torch.nn.Parameter(shape, requires_grad=parameter.requires_grad))
    set_part(module, name, part)


def adapted(folder, config, transform, *, kind=None, start=None, frozen=()):
    checkpoint = open_checkpoint(folder)
    with torch.device("meta"):
        model = build_model(checkpoint.config)
    apply_lora(model, config, is_given=start is not None)
    transform(model)
    allocate_lora(model, device="cpu", dtype=torch.float32)
    torch.manual_seed(3)
    init_lora(model, config.init)
    if start is not None:
        fill(model, start, init=config.init)
    weights = BaseWeights(
        model,
        dtype=torch.bfloat16,
        trained_dtype=torch.float32,
        frozen=frozen,
        pack=None if kind is None else packer(kind, double_quantization=False),
        packable=packable(model) if kind else (),
        whole=start.whole if start is not None else {},
        fresh=None if start is not None else config.init,
    )
    checkpoint.load_into(model, place=weights)
    return model


def fsdp(model):
    fully_shard(model.model.layers[0], mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def tensor_parallel(model):
    by_hand(model, dist.get_rank(), dist.get_world_size())


def dense_values(tensor):
    return tensor.dense(torch.float32) if isinstance(tensor, PackedWeight) else tensor.detach()


def check_parts(folder, options, transform, kind=None):
    """Everything that this rank has is its part of what one device has, fresh and from an adapter, over another."""
    config = LoRAConfig(**options)
    whole = adapted(folder, config, lambda model: None, kind=kind)
    check_equal(adapted(folder, config, transform, kind=kind), whole)
    with torch.no_grad():
        for parameter in whole.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    start = adapter_of(whole, config)
    again = {"kind": kind, "start": start, "frozen": () if config.init == "pissa" else (start,)}
    check_equal(
        adapted(folder, config, transform, **again), adapted(folder, config, lambda model: None, **again), start=True
    )


def check_equal(model, whole, *, start=False):
    held, wanted = parts(model), dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        mine, expected = dense_values(local(parameter)), held[name].of(dense_values(wanted[name]))
        torch.testing.assert_close(mine, expected, rtol=0, atol=0, msg=f"{name} {start}")


CONFIGS = {
    "plain": {"rank": 4, "targets": ("q_proj", "o_proj", "down_proj", "embed_tokens"), "modules_to_save": ("norm",)},
    "gaussian": {"rank": 4, "init": "gaussian"},
    "dora": {"rank": 4, "use_dora": True},
    "pissa": {"rank": 4, "init": "pissa"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_rank_begins_with_its_part(two_ranks, base, name):
    for transform in (fsdp, tensor_parallel):
        two_ranks.run(check_parts, base, CONFIGS[name], transform)


@pytest.mark.parametrize(
    "options", [{"rank": 4, "init": "loftq"}, {"rank": 4, "use_dora": True}], ids=["loftq", "dora"]
)
def test_a_quantised_part_is_that_of_the_quantised_whole(two_ranks, base, options):
    for transform in (fsdp, tensor_parallel):
        two_ranks.run(check_parts, base, options, transform, "nf4")


def test_a_part_that_cuts_blocks_is_refused(two_ranks, tmp_path):
    """Half of 96 columns begins in the middle of a block of 64."""
    folder = save_tiny_checkpoint(tmp_path / "model", tiny_config(num_hidden_layers=1))
    for message in two_ranks.run(error_of_quantising, folder):
        assert "down_proj.weight' (64, 96) can't be quantised in the part" in message


def error_of_quantising(folder):
    with pytest.raises(UnsupportedError) as caught:
        adapted(folder, LoRAConfig(rank=4), tensor_parallel, kind="nf4")
    return str(caught.value)
