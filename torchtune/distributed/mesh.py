"""How the ranks of a run are laid out: along which axes data, layers, experts and documents are split.

    rank = ((replicate * shard_size + shard) * context_size + context) * tensor_size + tensor

The tensor axis is innermost, since it talks most and neighbours have the fastest links. The expert axis has no ranks
of its own: it goes through those of shard and context, consecutive ones together.

Without a launcher every axis has one rank and nothing is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchtune.distributed.process_group import rank, world_size
from torchtune.errors import Problems

SIZES = ("data_parallel_replicate", "data_parallel_shard", "context_parallel", "tensor_parallel")


@dataclass(frozen=True)
class MeshSizes:
    """How many ranks each axis has.

    Attributes:
        replicate: copies of the model, each for other rows.
        shard: ranks that share one copy, each for other rows (FSDP); -1 is whatever the others leave.
        context: ranks that share the tokens of a row.
        tensor: ranks that share each layer.
        expert: ranks that share a layer's experts.
    """

    replicate: int = 1
    shard: int = -1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    def fitted(self, num_ranks: int) -> MeshSizes:
        """The same with `shard` known, for so many ranks.

        Raises:
            ConfigError: the sizes do not make up the number of ranks; all problems at once.
        """
        problems = Problems()
        others = self.replicate * self.context * self.tensor
        shard = max(num_ranks // others, 1) if self.shard == -1 else self.shard
        product = others * shard
        if product != num_ranks:
            sizes = zip(SIZES, (self.replicate, self.shard, self.context, self.tensor), strict=True)
            given = [(name, size) for name, size in sizes if size not in (1, -1)]
            what = " x ".join(f"{name}={size}" for name, size in given) + ": " if len(given) > 1 else ""
            verb = "does not divide" if self.shard == -1 else "is not"
            fitting = [str(n) for n in range(1, num_ranks + 1) if num_ranks % n == 0]
            remedy = (
                f"sizes must divide it ({', '.join(fitting)})" if num_ranks > 1 else "one process can split nothing"
            )
            problems.add(
                given[0][0] if given else "data_parallel_shard",
                f"{what}{others if self.shard == -1 else product} {verb} the number of processes, {num_ranks}: {remedy}, "
                "or start as many as there are places (--nproc_per_node, --nnodes)",
            )
        elif (shard * self.context) % self.expert:
            problems.add(
                "expert_parallel",
                f"{self.expert} does not divide data_parallel_shard x context_parallel, {shard} x {self.context}, "
                "whose ranks share the experts",
            )
        problems.raise_all()
        return MeshSizes(self.replicate, shard, self.context, self.tensor, self.expert)

    def _sizes(self) -> tuple[int, int, int, int]:
        return self.replicate, self.shard, self.context, self.tensor


@dataclass(frozen=True)
class Axis:
    """The ranks along one direction of the mesh that this one belongs to.

    Attributes:
        size: how many.
        rank: which of them this is.
        group: their process group; None where this is the only one.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = field(default=None, repr=False)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over the axis, in place; the host does not wait on CUDA."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def max(self, tensor: torch.Tensor) -> torch.Tensor:
        """The largest along the axis, element by element, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor


@dataclass(frozen=True)
class Mesh:
    """The axes of a run, as one rank sees them.

    Attributes:
        sizes: of all axes.
        data: ranks that read different rows: replicate and shard.
        tokens: ranks that hold different tokens: replicate, shard and context. A gradient is the sum over them.
        context, tensor, expert: ranks that share a row's tokens, each layer, a layer's experts.
        same_experts: those of `tokens` that hold the same experts.
        fsdp: what FSDP shards over, (replicate, shard x context) or the latter alone; None where shard is 1.
        expert_fsdp: the same for experts, which their own axis has split already.
    """

    sizes: MeshSizes = field(default_factory=lambda: MeshSizes(shard=1))
    data: Axis = Axis()
    tokens: Axis = Axis()
    context: Axis = Axis()
    tensor: Axis = Axis()
    expert: Axis = Axis()
    same_experts: Axis = Axis()
    fsdp: DeviceMesh | None = None
    expert_fsdp: DeviceMesh | None = None

    def place_of(self, micro_batch: int, num_micro_batches: int) -> int:
        """A number for this rank's tokens in a step, to seed dropout by: others where the tokens are others."""
        return (self.data.rank * num_micro_batches + micro_batch) * self.context.size + self.context.rank


def build_mesh(sizes: MeshSizes, device: torch.device) -> Mesh:
    """The mesh of all ranks. Every rank calls it; prefer `open_mesh`, which leaves no group behind.

    Raises:
        ConfigError: as `MeshSizes.fitted`.
    """
    return _build(sizes, device, made=[])


@contextmanager
def open_mesh(sizes: MeshSizes, device: torch.device) -> Iterator[Mesh]:
    """The mesh of all ranks; its process groups end with the block.

    Raises:
        ConfigError: as `MeshSizes.fitted`.
    """
    made = list[dist.ProcessGroup]()
    try:
        yield _build(sizes, device, made)
    finally:
        for group in made:
            if dist.is_initialized():
                dist.destroy_process_group(group)


def _build(sizes: MeshSizes, device: torch.device, made: list[dist.ProcessGroup]) -> Mesh:
    sizes = sizes.fitted(world_size())
    if not dist.is_initialized():
        return Mesh(sizes)
    ranks = torch.arange(world_size()).view(sizes.replicate, sizes.shard, sizes.context, sizes.tensor)
    # [replicate, those with other experts, expert, tensor]
    by_expert = ranks.view(sizes.replicate, -1, sizes.expert, sizes.tensor)

    def axis(grouped: torch.Tensor) -> Axis:
        """grouped: [.., size], a row for each group."""
        rows = grouped.reshape(-1, grouped.shape[-1]).tolist()
        own = next(row for row in rows if rank() in row)
        if len(own) == 1:
            return Axis()
        group = dist.group.WORLD
        if len(own) < world_size():
            groups = [dist.new_group(row) for row in rows]
            group = groups[rows.index(own)]
            made.append(group)
        return Axis(len(own), own.index(rank()), group)

    return Mesh(
        sizes=sizes,
        data=axis(ranks.flatten(0, 1).permute(1, 2, 0)),
        tokens=axis(ranks.flatten(0, 2).T),
        context=axis(ranks.transpose(2, 3)),
        tensor=axis(ranks),
        expert=axis(by_expert.transpose(2, 3)),
        same_experts=axis(by_expert.flatten(0, 1).permute(1, 2, 0)),
        fsdp=_fsdp_mesh(device, sizes, sizes.shard * sizes.context, 1, made),
        expert_fsdp=_fsdp_mesh(device, sizes, sizes.shard * sizes.context // sizes.expert, sizes.expert, made),
    )


def _fsdp_mesh(
    device: torch.device, sizes: MeshSizes, num_shards: int, num_apart: int, made: list[dist.ProcessGroup]
) -> DeviceMesh | None:
    """(replicate, shard) of the ranks that differ in nothing else, or shard alone where there is one replica."""
    if sizes.shard == 1:
        return None
    shape, names = (sizes.replicate, num_shards, num_apart * sizes.tensor), ("replicate", "shard", "apart")
    whole = init_device_mesh(device.type, shape, mesh_dim_names=names)
    made += [group for group in whole.get_all_groups() if group is not dist.group.WORLD]
    return whole["replicate", "shard"] if sizes.replicate > 1 else whole["shard"]
