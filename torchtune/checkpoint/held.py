"""What the ranks hold of a model, and the way to put a tensor together from its parts on one of them.

Nothing is gathered: the rank that writes a tensor gets, one tensor at a time, what others have of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torchtune.distributed.part import Part, held_tensors, parts
from torchtune.distributed.peers import Attempt, Peers
from torchtune.errors import CheckpointError
from torchtune.modules.packed import PackedWeight, unpacked
from torchtune.modules.stored import unstored_parameters


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
        self, name: str, at: int, *, region: Part | None = None, dtype: torch.dtype | None = None
    ) -> Tensor | None:
        """A tensor, or a region of it, on the rank `at`; None on others, and where the attempt has failed.

        Args:
            dtype: what it is cast to by those who have it, on the CPU; None leaves it as it is held, where one rank has
                all of it even on its device and packed.
        """
        region = region or Part.all_of(self.parts[name].whole)
        me, shares = self.peers.rank, self._shares(name, region, at)
        if [rank for rank, _ in shares] == [at]:
            return self.attempt(self._cast, name, region, dtype) if me == at else None
        dtype = dtype or (torch.float32 if isinstance(self.tensors[name], PackedWeight) else self.tensors[name].dtype)
        whole = torch.empty(region.shape, dtype=dtype) if me == at else None
        for rank, share in shares:
            if whole is not None and rank == me:
                self.attempt(self._put, name, share, region, whole)
            elif whole is not None:
                self._receive(share.inside(region), whole, rank)
            elif rank == me:
                given = self.attempt(self._cast, name, share, dtype)
                self.peers.send(torch.empty(share.shape, dtype=dtype) if given is None else given.contiguous(), at)
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

    def _cast(self, name: str, share: Part, dtype: torch.dtype | None) -> Tensor:
        if dtype is None:
            return self.tensors[name] if share == self.parts[name] else self._own(name, share)
        return self._own(name, share).to(device="cpu", dtype=dtype)

    def _put(self, name: str, share: Part, region: Part, whole: Tensor) -> None:
        share.inside(region).put(self._own(name, share), whole)

    def _receive(self, place: Part, whole: Tensor, source: int) -> None:
        """Fill a part of `whole` from another rank; rows go straight to their place."""
        if len(place.ranges) > 0 and len(place.ranges[0]) == 1 and place.shape[1:] == place.whole[1:]:
            start, end = place.ranges[0][0]
            self.peers.receive(whole[start:end], source)
            return
        received = torch.empty(place.shape, dtype=whole.dtype)
        self.peers.receive(received, source)
        place.put(received, whole)


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
