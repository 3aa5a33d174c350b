"""Attention over documents on the CPU, without gradients: short ones together, common beginnings once for all.

    A B C D | E F | G    E F begins with A B, and G with A B E: all of them see A B by one product, G sees E besides

Each token sees its own stretch causally and the beginnings before it whole. A softmax over several parts is the mean
of theirs, weighed by the sums of each (as in flash attention, Dao et al., 2022, arXiv:2205.14135).
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from torchtune.modules.cpu_attention import LENGTH_STEP
from torchtune.modules.documents import Documents

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class _Group:
    """Stretches of like length, padded at their ends to one.

    Attributes:
        index: [B L] the token at each place; at padding any.
        real: [n] the places that are no padding.
        tokens: [n] the tokens there.
    """

    num_stretches: int
    index: Tensor
    real: Tensor
    tokens: Tensor

    def padded(self, x: Tensor) -> Tensor:
        """[T, heads, H] -> [B, heads, L, H]."""
        return x.index_select(0, self.index).unflatten(0, (self.num_stretches, -1)).transpose(1, 2)

    def put(self, made: Tensor, target: Tensor) -> None:
        """made [B, heads, L, ...], written to target [T, heads, ...]."""
        target[self.tokens] = made.transpose(1, 2).flatten(0, 1)[self.real].to(target.dtype)


@dataclass(frozen=True)
class _Alone:
    """A stretch that no other is like: a group of one, without padding."""

    tokens: slice

    def padded(self, x: Tensor) -> Tensor:
        """[T, heads, H] -> [1, heads, L, H]."""
        return x[self.tokens].transpose(0, 1)[None]

    def put(self, made: Tensor, target: Tensor) -> None:
        """made [1, heads, L, ...], written to target [T, heads, ...]."""
        target[self.tokens] = made[0].transpose(0, 1)


@dataclass(frozen=True)
class _Beginning:
    """Keys that consecutive stretches see whole."""

    keys: slice
    queries: slice


_Plan = tuple[list[_Group | _Alone], list[_Beginning]]


def attend_tree(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> Tensor:
    """As `attend` in attend.py, without windows; documents that are split lie on this rank.

    Letters: T packed tokens, Q query heads, K key/value heads, H head_dim; B stretches of L places.
    """
    groups, beginnings = _plan(documents)
    wide = torch.promote_types(q.dtype, torch.float32)
    # Where parts are added up, only their sum is rounded.
    out = torch.empty(q.shape, dtype=wide if beginnings else q.dtype)
    log_sum = torch.empty(q.shape[:2], dtype=wide)
    for group in groups:
        made, sums = _flash(*(group.padded(x) for x in (q, k, v)), 0.0, True, scale=scale)  # [B, Q, L, H], [B, Q, L]
        group.put(made, out)
        if beginnings:
            group.put(sums, log_sum)
    for beginning in beginnings:
        seen = [x.transpose(0, 1)[None] for x in (q[beginning.queries], k[beginning.keys], v[beginning.keys])]
        made, sums = _flash(*seen, 0.0, False, scale=scale)
        made, sums = made[0].transpose(0, 1), sums[0].T  # [n, Q, H], [n, Q]
        before = log_sum[beginning.queries]
        total = torch.logaddexp(before, sums.to(wide))
        out[beginning.queries].mul_((before - total).exp_()[..., None]).add_(made * (sums - total).exp_()[..., None])
        before.copy_(total)
    return out.to(q.dtype)


def _plan(documents: Documents) -> _Plan:
    """Made once a batch, used by every layer."""
    made: list[_Plan] = documents.__dict__.setdefault("_tree_plan", [])
    if not made:
        by_length: dict[int, list[tuple[int, int]]] = {}
        for start, end in documents.bounds:
            if end > start:
                by_length.setdefault((end - start - 1) // LENGTH_STEP, []).append((start, end))
        made.append(([_group(bounds) for bounds in by_length.values()], _beginnings(documents)))
    return made[0]


def _group(bounds: list[tuple[int, int]]) -> _Group | _Alone:
    if len(bounds) == 1:
        return _Alone(slice(*bounds[0]))
    starts, ends = torch.tensor(bounds).T[..., None]  # [B, 1]
    index = starts + torch.arange(int((ends - starts).max()))
    real = (index < ends).flatten().nonzero().squeeze(-1)
    index = torch.where(index < ends, index, starts).flatten()
    return _Group(len(bounds), index, real, index[real])


def _beginnings(documents: Documents) -> list[_Beginning]:
    """What stretches see besides themselves, cut so that each piece is seen whole or not at all."""
    if documents.split is None:
        return []
    assert documents.split.axis.size == 1, "other ranks have keys of these documents"
    seen: list[list[tuple[int, int]]] = []
    for stretch in documents.split.stretches:
        seen.append(_runs(documents.split.places[stretch.first : stretch.start]))
    cuts = sorted({edge for runs in seen for run in runs for edge in run})
    viewers: dict[tuple[int, int], list[int]] = {}
    for number, runs in enumerate(seen):
        for start, end in runs:
            inside = cuts[bisect_left(cuts, start) : bisect_left(cuts, end) + 1]
            for piece in pairwise(inside):
                viewers.setdefault(piece, []).append(number)
    found = []
    for piece, numbers in viewers.items():
        for first, last in _consecutive(numbers):
            queries = slice(documents.bounds[first][0], documents.bounds[last][1])
            found.append(_Beginning(slice(*piece), queries))
    return found


def _runs(places: Tensor) -> list[tuple[int, int]]:
    """Places as spans of consecutive ones."""
    if not len(places):
        return []
    breaks = (places.diff() != 1).nonzero().squeeze(-1)
    firsts = torch.cat((places[:1], places[breaks + 1])).tolist()
    lasts = torch.cat((places[breaks], places[-1:])).tolist()
    return [(first, last + 1) for first, last in zip(firsts, lasts, strict=True)]


def _consecutive(numbers: list[int]) -> list[tuple[int, int]]:
    """Rising numbers as first and last of each run."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
