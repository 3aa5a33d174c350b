"""Context parallelism: ranks share the tokens of a batch, so that a row may be longer than one device holds.

Each rank holds as many tokens as the others, and about as much of the work of attention. A long document is cut into
two pieces a rank, from both ends inwards, since its later half sees three times as much as the first; short ones stay
whole and go where there is least to do. Over random packs (log-normal lengths around 250 in 4096 tokens, 20 to 150 in
2048, 1024 to 8192 in 8192) on 2, 4 and 8 ranks, the rank with the most causal work has 1.00 to 1.02 times the mean.
If the token axis is cut from both ends as one, it has 1.06 to 1.70 times; if every document is cut, it is as balanced
with up to four times as many pieces. Within windows of 128 it is 1.00 to 1.05; within chunks of 512, up to 1.24.

The model does the rest: attention (modules/attend.py) gathers keys and values over the axis, and all else looks at
one token. Labels were shifted before, within whole documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune.data.batch import DUMMY_ID, NOT_TRAINED, Batch
from torchtune.distributed.mesh import Axis
from torchtune.modules.documents import Documents, Split, Stretch

# A document of more than this part of a rank's tokens is cut. In the same packs, at 1/2 the busiest rank has up to
# 1.2 times the mean work, and at 1/8 there are up to 2.3 times as many pieces.
CUT_ABOVE = 1 / 4

Span = tuple[int, int, int]  # a document's number, its first token that is meant, and the one after the last


def shard_context(batch: Batch, axis: Axis, *, multiple: int = 1) -> Batch:
    """This rank's tokens of a batch that all ranks of the axis have.

    Every rank holds the same number of tokens, a multiple of `multiple`, with dummies where there are too few. The
    counts are those of the tokens held, so that they add up to the batch's; `sources` and `rows` stay the batch's.
    Call it before the batch goes to a device.
    """
    if axis.size == 1:
        return batch.padded_to(multiple)
    num_real = batch.documents.num_real
    lengths = [end - start for start, end in batch.documents.bounds if end <= num_real]
    capacity = max(-(-num_real // (axis.size * multiple)), 1) * multiple
    dealt = deal_tokens(lengths, axis.size, capacity)
    documents, held = _documents_of(lengths, dealt, capacity, axis)
    num_dummy = axis.size * capacity - num_real
    labels = F.pad(batch.labels[:num_real], (0, num_dummy), value=NOT_TRAINED)[held]
    trained = (labels != NOT_TRAINED).nonzero().squeeze(-1)
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids[:num_real], (0, num_dummy), value=DUMMY_ID)[held],
        labels=labels,
        trained=trained,
        documents=documents,
        num_trained=len(trained),
        num_tokens=documents.num_real,
    )


def _documents_of(
    lengths: Sequence[int], dealt: Sequence[Sequence[Span]], capacity: int, axis: Axis
) -> tuple[Documents, Tensor]:
    """This rank's documents, and the places of their tokens where all lie one after the other, dummies last."""
    rooms = [capacity - sum(end - start for _, start, end in spans) for spans in dealt]
    # The dummies that fill a rank up are one more document.
    with_dummies = [*lengths, *rooms]
    spans_of = [[*spans, (len(lengths) + rank, 0, rooms[rank])] for rank, spans in enumerate(dealt)]
    begins = [0, *accumulate(with_dummies)]
    stretches = [
        [
            Stretch(index, begins[index], begins[index] + start, begins[index] + end)
            for index, start, end in spans
            if end
        ]
        for spans in spans_of
    ]
    order = torch.cat([torch.arange(part.start, part.end) for each in stretches for part in each])
    own = tuple(stretches[axis.rank])
    documents = Documents.from_lengths(
        [part.end - part.start for part in own], starts=[part.start - part.first for part in own]
    )
    split = Split(axis, tuple(with_dummies), own, places=order.argsort())
    held = order.view(axis.size, capacity)[axis.rank]
    return replace(documents, num_dummy=rooms[axis.rank], split=split), held


def deal_tokens(lengths: Sequence[int], num_ranks: int, capacity: int) -> list[list[Span]]:
    """Which tokens of which documents each rank holds: at most `capacity`, and about equal work of attention.

    Args:
        lengths: tokens of each document; together at most num_ranks x capacity.
    Returns:
        For each rank its spans, by document and place; every token exactly once.
    """
    shares = [_Share(capacity) for _ in range(num_ranks)]
    num_cut = 0
    for document in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if lengths[document] > CUT_ABOVE * capacity:
            # Each begins with another rank: where there is a window or a chunk, the first piece is less work.
            turn = num_cut % num_ranks
            _cut(document, lengths[document], shares[turn:] + shares[:turn])
            num_cut += 1
        else:
            _put(document, lengths[document], shares)
    return [share.merged() for share in shares]


@dataclass
class _Share:
    """What one rank gets.

    Attributes:
        room: how many more tokens it may hold.
        work: products of queries and keys, where a token sees all before it.
    """

    room: int
    work: int = 0
    spans: list[Span] = field(default_factory=list)

    def add(self, document: int, start: int, end: int) -> None:
        if start < end:
            self.spans.append((document, start, end))
            self.room -= end - start
            self.work += end * (end + 1) // 2 - start * (start + 1) // 2

    def merged(self) -> list[Span]:
        """The spans in order, neighbours as one."""
        merged: list[Span] = []
        for document, start, end in sorted(self.spans):
            if merged and merged[-1][0] == document and merged[-1][2] == start:
                merged[-1] = (document, merged[-1][1], end)
            else:
                merged.append((document, start, end))
        return merged


def _cut(document: int, length: int, shares: list[_Share]) -> None:
    """The same number of tokens to each, half of them from the front and half, in reverse, from behind."""
    sizes = [length // len(shares)] * len(shares)
    by_room = sorted(range(len(shares)), key=lambda index: shares[index].room, reverse=True)
    for index in by_room[: length % len(shares)]:
        sizes[index] += 1
    halves = [(share, size - size // 2) for share, size in zip(shares, sizes, strict=True)]
    halves += [(share, size // 2) for share, size in zip(reversed(shares), reversed(sizes), strict=True)]
    start = 0
    for share, size in halves:
        share.add(document, start, start + size)
        start += size


def _put(document: int, length: int, shares: list[_Share]) -> None:
    """Whole to the one with the least work that has room for it, else piece by piece to those with the most room."""
    start = 0
    while start < length:
        roomy = [share for share in shares if share.room >= length - start]
        share = min(roomy, key=lambda share: share.work) if roomy else max(shares, key=lambda share: share.room)
        end = min(length, start + share.room)
        share.add(document, start, end)
        start = end
