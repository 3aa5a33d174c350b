"""One adapter from several: their weighted sum or average, exact or of a chosen rank."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from torchtune.adapters.adapter import Adapter, LowRankUpdate
from torchtune.adapters.init import factors
from torchtune.errors import ConfigError


def average_adapters(adapters: Sequence[Adapter], *, rank: int | None = None) -> Adapter:
    """The adapter whose update is the mean of theirs; as `combine_adapters`."""
    return combine_adapters(adapters, [1 / len(adapters)] * len(adapters), rank=rank)


def combine_adapters(adapters: Sequence[Adapter], weights: Sequence[float], *, rank: int | None = None) -> Adapter:
    """The adapter whose update of each layer is the weighted sum of theirs.

    Averaging A and B apart would not give that: the update is their product. Here the matrices are put side by side,
    which is exact and of the sum of their ranks.

    Args:
        weights: one for each adapter.
        rank: cut each update to its best approximation of this rank.
    Raises:
        ConfigError: nothing to combine, DoRA's adapters (whose updates depend on the base), or layers that were
            trained whole, whose base is not known here.
    """
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(f"{len(adapters)} adapters and {len(weights)} weights; give one for each", key="adapter")
    for index, adapter in enumerate(adapters):
        if any(update.magnitude is not None for update in adapter.updates.values()):
            raise ConfigError(
                f"adapter {index} is DoRA's: its update depends on the base, so it has no weighted sum; merge them "
                "into the base one after another",
                key="adapter",
            )
        if adapter.whole:
            raise ConfigError(
                f"adapter {index} has '{min(adapter.whole)}' trained whole, which is no update that could be weighed; "
                "merge them into the base one after another",
                key="adapter",
            )
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter.updates))
    updates = {}
    for name in names:
        parts = [(a.updates[name], w) for a, w in zip(adapters, weights, strict=True) if name in a.updates]
        updates[name] = _cut(_side_by_side(parts), rank) if rank else _side_by_side(parts)
    ranks = {name: update.rank for name, update in updates.items()}
    largest = max(ranks.values())
    config = replace(
        adapters[0].config,
        rank=largest,
        alpha=float(largest),
        targets=tuple(updates),
        use_rslora=False,
        rank_pattern={re.escape(name): value for name, value in ranks.items() if value != largest},
        alpha_pattern={re.escape(name): float(value) for name, value in ranks.items() if value != largest},
    )
    bases = {adapter.base for adapter in adapters}
    return Adapter(config, updates, base=bases.pop() if len(bases) == 1 else None)


def _side_by_side(parts: Sequence[tuple[LowRankUpdate, float]]) -> LowRankUpdate:
    a = torch.cat([update.a for update, _ in parts], dim=-2)
    b = torch.cat([update.b * (update.scale * weight) for update, weight in parts], dim=-1)
    return LowRankUpdate(a, b, 1.0)


def _cut(update: LowRankUpdate, rank: int) -> LowRankUpdate:
    if update.rank <= rank:
        return update
    # The small matrices between two orthogonal bases have all singular values of the large product.
    wide = torch.promote_types(update.a.dtype, torch.float32)
    if update.a.dim() == 3:
        cut = [_cut(LowRankUpdate(a, b, 1.0), rank) for a, b in zip(update.a, update.b, strict=True)]
        return LowRankUpdate(torch.stack([one.a for one in cut]), torch.stack([one.b for one in cut]), 1.0)
    left, right = torch.linalg.qr(update.b.to(wide)), torch.linalg.qr(update.a.to(wide).T)
    a, b = factors(left.R @ right.R.T, rank, 1.0)
    return LowRankUpdate(_like(a @ right.Q.T, update.a), _like(left.Q @ b, update.b), 1.0)


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    return tensor.to(other.dtype)
