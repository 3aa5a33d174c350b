"""Models of which each rank holds a part, made by hand, whatever the package's own transforms do."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from torchtune.checkpoint.open import Checkpoint, open_checkpoint
from torchtune.distributed.part import Part, set_part
from torchtune.models.build import build_model
from torchtune.modules.decoder import CausalLM
from torchtune.modules.moe import Experts


def built(folder) -> tuple[CausalLM, Checkpoint]:
    """A model on the meta device and the checkpoint that it is of."""
    checkpoint = open_checkpoint(folder)
    with torch.device("meta"):
        return build_model(checkpoint.config), checkpoint


def built_in_parts(folder, how) -> tuple[CausalLM, Checkpoint]:
    """The same, of which this rank has a part.

    Args:
        how: words of `split` (matrices and experts between every two ranks), `shard` (FSDP over all ranks), `hybrid`
            (over half of them, twice).
    """
    model, checkpoint = built(folder)
    size = dist.get_world_size()
    if "split" in how:
        split(model, dist.get_rank() % 2, 2)
    if "hybrid" in how:
        shard(model, init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard")))
    elif "shard" in how and "split" in how:
        shard(model, init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("shard", "split"))["shard"])
    elif "shard" in how:
        shard(model, init_device_mesh("cpu", (size,)))
    return model, checkpoint


def shard(model, mesh):
    """FSDP as a recipe has it: a layer at a time, then the rest; gradients are summed."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def split(model, rank, size):
    """Parts of matrices by hand, in both directions; of stacks of experts some experts, or some rows of each."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            part = Part.all_of(parameter.shape)
            if isinstance(module, Experts):
                half = parameter.shape[1] // 2
                is_gated = name == "gate_up_proj"
                part = part.take(1, rank, size, stretches=(half, half)) if is_gated else part.take(0, rank, size)
            elif parameter.dim() == 2:
                part = part.take(parameter.shape[0] % 3 and 1, rank, size)
            setattr(module, name, torch.nn.Parameter(torch.empty(part.shape, device="meta")))
            set_part(module, name, part)
