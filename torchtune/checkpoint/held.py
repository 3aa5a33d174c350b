"""What the ranks hold of a model, and the way to put a tensor together from its parts on one of them.

Nothing is gathered: the rank that writes a tensor gets, one tensor at a time, what others have of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from torchtune.distributed.part import Part, held_tensors, parts
from torchtune.distributed.peers import Attempt, Peers
from torchtune.errors import CheckpointError
from torchtune.modules.packed import PackedWeight, unpacked
from torchtune.modules.stored import unstored_parameters

# What is sent at a time: beside the tensor that it belongs to, one such block is in memory.
BLOCK_BYTES = 16 * 2**20


class Scratch:
    """Memory for one tensor after the other: a new one each time would leave holes that the allocator does not fill."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """One whose values are not set, instead of the last one."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if len(self._memory) < num_bytes:
            del self._memory  # before there is more
            self._memory = torch.empty(num_bytes, dtype=torch.uint8)
        return self._memory[:num_bytes].view(dtype).view(shape)


class Held:
    """The tensors of a model, of which each rank has parts.

    All ranks make it, and call `put_together` for the same tensors in the same order. What fails on one of them stands
    in `attempt`: it goes on taking part, and `attempt.finish()` raises.

    Args:
        tensors: what this rank holds, plain tensors by name.
        parts: which part of the whole each is.

    Attributes:
        attempt: of what this rank does while others wait for it.
    """

    def __init__(self, tensors: Mapping[str, Tensor], parts: Mapping[str, Part], peers: Peers) -> None:
        self.tensors, self.parts, self.peers = tensors, parts, peers
        self.attempt = Attempt()
        self._block = Scratch()
        self._holders: dict[str, dict[Part, list[int]]] = {}
        for index, of_rank in enumerate(peers.gather(dict(parts))):
            for name, part in of_rank.items():
                self._holders.setdefault(name, {}).setdefault(part, []).append(index)

    @classmethod
    def by(cls, model: nn.Module, peers: Peers, *, copied: bool = False) -> Held:
        """What the ranks hold of `model` now.

        Args:
            copied: what is trained is copied to the host, so that training may go on.
        """
        tensors = held_tensors(model)
        if copied:
            trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            tensors = {name: _copy(tensor) if name in trained else tensor for name, tensor in tensors.items()}
        return cls(tensors, parts(model), peers)

    def put_together(
        self,
        name: str,
        at: int,
        *,
        region: Part | None = None,
        dtype: torch.dtype | None = None,
        scratch: Scratch | None = None,
    ) -> Tensor | None:
        """A tensor, or a region of it, on the rank `at`; None on others, and where the attempt has failed.

        Args:
            dtype: what it is cast to by those who have it, on the CPU; None leaves it as it is held, where one rank has
                all of it even on its device and packed.
            scratch: memory for it, until that is used for the next one; by default it has its own.
        """
        region = region or Part.all_of(self.parts[name].whole)
        me, shares = self.peers.rank, self._shares(name, region, at)
        scratch = scratch or Scratch()
        if [rank for rank, _ in shares] == [at]:
            return self.attempt(self._alone, name, region, dtype, scratch) if me == at else None
        is_packed = isinstance(self.tensors[name], PackedWeight)
        dtype = dtype or (torch.float32 if is_packed else self.tensors[name].dtype)
        whole = scratch.tensor(region.shape, dtype) if me == at else None
        for rank, share in shares:
            for block in [share] if is_packed else _blocks(share, dtype):  # it is unpacked once
                if rank == me:
                    self._give(name, block, region, whole, dtype, at)
                elif whole is not None:
                    self._receive(block.inside(region), whole, rank)
        return whole

    def everywhere(self, name: str) -> Tensor:
        """The whole of a tensor on every rank, on the CPU unless this rank has it."""
        if list(self._holders[name]) == [Part.all_of(self.parts[name].whole)]:
            return self.tensors[name]
        whole = self.put_together(name, 0)
        if whole is None:
            whole = torch.empty(self.parts[name].whole, dtype=self.tensors[name].dtype)
        self.peers.broadcast(whole)
        return whole

    def _shares(self, name: str, region: Part, at: int) -> list[tuple[int, Part]]:
        """Who gives which part of the region: the receiver what it has itself, else the lowest rank that has it."""
        shares: dict[Part, int] = {}
        for part, ranks in self._holders[name].items():
            share = part.meet(region)
            if share.numel and shares.get(share) != at:
                shares[share] = at if at in ranks else ranks[0]
        if sum(share.numel for share in shares) != region.numel:
            raise CheckpointError(
                f"the ranks do not hold all of '{name}' {region.whole}, or some of it in parts that overlap"
            )
        return [(rank, share) for share, rank in shares.items()]

    def _own(self, name: str, share: Part) -> Tensor:
        """What this rank has of a share, as it is held; packed weights dense, in float32."""
        held = self.tensors[name]
        held = unpacked(held, torch.float32) if isinstance(held, PackedWeight) else held
        share = share.inside(self.parts[name])
        return held if share.is_whole else share.of(held)

    def _alone(self, name: str, share: Part, dtype: torch.dtype | None, scratch: Scratch) -> Tensor:
        if dtype is None and share == self.parts[name]:
            return self.tensors[name]
        own = self._own(name, share)
        if dtype is None or (own.dtype == dtype and own.device.type == "cpu"):
            return own
        return scratch.tensor(share.shape, dtype).copy_(own)

    def _give(self, name: str, block: Part, region: Part, whole: Tensor | None, dtype: torch.dtype, at: int) -> None:
        """A block that this rank has, to its place in `whole`, or to the rank that has that."""
        if whole is not None:
            self.attempt(self._put, name, block, block.inside(region), whole)
            return
        given = self._block.tensor(block.shape, dtype)
        self.attempt(self._put, name, block, Part.all_of(block.shape), given)
        self.peers.send(given, at)

    def _put(self, name: str, share: Part, place: Part, into: Tensor) -> None:
        place.put(self._own(name, share), into)

    def _receive(self, place: Part, whole: Tensor, source: int) -> None:
        """Fill a part of `whole` from another rank; rows go straight to their place."""
        if len(place.ranges) > 0 and len(place.ranges[0]) == 1 and place.shape[1:] == place.whole[1:]:
            start, end = place.ranges[0][0]
            self.peers.receive(whole[start:end], source)
            return
        received = self._block.tensor(place.shape, whole.dtype)
        self.peers.receive(received, source)
        place.put(received, whole)


def _blocks(share: Part, dtype: torch.dtype) -> Iterator[Part]:
    """The share in rows of it that can be sent at a time."""
    if share.numel * dtype.itemsize <= BLOCK_BYTES:
        yield share
        return
    num_rows = share.shape[0]
    step = max(BLOCK_BYTES * num_rows // (share.numel * dtype.itemsize), 1)
    for start in range(0, num_rows, step):
        yield share.narrow(0, start, min(step, num_rows - start))


def trained_values(model: nn.Module, held: Held) -> dict[str, Tensor]:
    """The whole of each trained parameter by name: of adapters its values, of others its shape, on the meta device."""
    adapters = unstored_parameters(model)
    return {
        name: held.everywhere(name)
        if name in adapters
        else torch.empty(held.parts[name].whole, dtype=parameter.dtype, device="meta")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
