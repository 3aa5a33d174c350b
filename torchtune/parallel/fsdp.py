"""FSDP2: each rank keeps a share of every matrix, and has a layer whole only while it computes.

Source: Zhao et al., 2023 (arXiv:2304.11277), Rajbhandari et al., 2020 (ZeRO, arXiv:1910.02054); torch's `fully_shard`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from torchtune.distributed.mesh import Mesh
from torchtune.modules.decoder import CausalLM
from torchtune.modules.moe import Experts, Router

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def apply_fsdp(
    model: CausalLM,
    mesh: Mesh,
    *,
    dtype: torch.dtype,
    reduce_dtype: torch.dtype = torch.float32,
    reshard_after_forward: bool = True,
    num_prefetched: int = 0,
    cpu_offload: bool = False,
    packed: Collection[str] = (),
    block: int = 1,
) -> list[str]:
    """Shard the model over `mesh.fsdp`, layer by layer; nothing is done where that has one rank. The last transform.

    What is sharded are matrices. Vectors (norms, biases) and routers stay whole on each rank: they are a thousandth of
    a model, and are computed with in float32, which what is gathered in `dtype` would not be. Gradients are summed,
    not averaged, for the loss is a sum.

    Args:
        model: on the meta device, or with weights that are the same on all ranks.
        dtype: what is computed in; weights are cast before they are gathered.
        reduce_dtype: gradients are summed in it.
        reshard_after_forward: let a layer go after the forward pass, and gather it again in the backward pass; without,
            there is less to send and all layers are in memory from one pass to the other.
        num_prefetched: layers that are gathered ahead, besides the one that is computed; on CUDA alone.
        cpu_offload: parameters, gradients and the optimizer's step are in host memory, and visit the device.
        packed: names of parameters that will be quantised, where they are frozen. Each rank packs its own rows of them,
            and they are gathered packed.
        block: so many values of those, one after the other along the rows, are quantised together.
    Returns:
        Those of `packed` that stay whole on each rank: their rows can't be shared out evenly, or not between blocks.
    """
    if mesh.fsdp is None:
        return []
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    from torchtune.parallel.host_transfers import use_host_transfers  # torch's FSDP takes a second to import

    if dtype == torch.float64:
        reduce_dtype = dtype  # who computes in it would lose it all in the sum
    frozen = {name: _num_shards(model, name, mesh) for name in packed if not model.get_parameter(name).requires_grad}
    whole = [name for name, num in frozen.items() if not _divides(model.get_parameter(name), num, block)]
    kept = _kept_whole(model) | {model.get_parameter(name) for name in whole}
    common = {
        # Activations have their type from the embedding on; integers must not be cast.
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
    }

    def shard(module: nn.Module, *, over: object = mesh.fsdp, reshard: bool | None = reshard_after_forward) -> None:
        ignored_here = {parameter for parameter in module.parameters() if parameter in kept}
        fully_shard(module, mesh=over, reshard_after_forward=reshard, ignored_params=ignored_here, **common)  # type: ignore[call-overload]

    layers: list[Any] = list(model.model.layers)  # they become FSDPModules
    for layer in layers:
        for experts in [module for module in layer.modules() if isinstance(module, Experts)]:
            if mesh.expert.size > 1:
                shard(experts, over=mesh.expert_fsdp)
        shard(layer)
    if not model.is_tied:
        shard(model.model.embed_tokens)
    # The head is used by the model's own forward, last there and first in the backward pass, so it stays in between.
    shard(model, reshard=None)
    for module in _sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        if mesh.fsdp.device_type == "cpu":
            use_host_transfers(module)
    for index, layer in enumerate(layers if num_prefetched else ()):
        layer.set_modules_to_forward_prefetch(layers[index + 1 : index + 1 + num_prefetched])
        layer.set_modules_to_backward_prefetch(layers[max(index - num_prefetched, 0) : index][::-1])
    return [name for name in whole if frozen[name] > 1]


def defer_sums(model: nn.Module, deferred: bool) -> None:
    """Say before a backward pass whether its gradients stay whole on this rank, to be summed with those of a later one.

    That sends a step's gradients once, however many micro-batches it has; each rank holds all of them meanwhile.
    """
    for module in _sharded_modules(model):
        module.set_requires_gradient_sync(not deferred, recurse=False)


def reshard(model: nn.Module) -> None:
    """Let go of what a forward pass without a backward pass has left gathered, so that parameters are shards again."""
    for module in _sharded_modules(model):
        module.reshard()


def _sharded_modules(model: nn.Module) -> Iterator[FSDPModule]:
    if dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        yield from (module for module in model.modules() if isinstance(module, FSDPModule))


def _num_shards(model: nn.Module, name: str, mesh: Mesh) -> int:
    """How many ranks share a matrix, of what tensor and expert parallelism have left of it."""
    is_expert = isinstance(model.get_submodule(name.rpartition(".")[0]), Experts)
    over = mesh.expert_fsdp if is_expert and mesh.expert.size > 1 else mesh.fsdp
    assert over is not None
    return over.size(-1)


def _divides(matrix: torch.Tensor, num_shards: int, block: int) -> bool:
    """Whether its rows, or matrices of a stack, can be shared out packed: as many to each rank, and in whole blocks."""
    # Of a packed weight that one rank has alone, FSDP would take one part and leave the others.
    is_even = num_shards > 1 and len(matrix) % num_shards == 0
    return is_even and (matrix.dim() == 3 or matrix.numel() // num_shards % block == 0)


def _kept_whole(model: nn.Module) -> set[nn.Parameter]:
    vectors = {parameter for parameter in model.parameters() if parameter.dim() < 2}
    routers = {module.weight for module in model.modules() if isinstance(module, Router)}
    return vectors | routers
