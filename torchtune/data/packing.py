"""Packing: which documents share a row. The rows of a run are planned with it in plan.py."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from torchtune.errors import DataError


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Group documents into rows of at most `capacity` tokens: the longest first, each into the fullest row it fits.

    Args:
        lengths: tokens of each document, in dataset order.
        capacity: tokens that a row holds at most.
    Returns:
        Indices into `lengths`, row by row; every index exactly once, ascending within a row, and the rows
        by their first index.
    Raises:
        DataError: a document is longer than `capacity`; names its index and both lengths.
    Source: best-fit packing, Ding et al., 2024 (arXiv:2404.10830).
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and sizes.max() > capacity:
        index = int(sizes.argmax())
        raise DataError(f"document {index} has {sizes[index]} tokens, a row holds {capacity}")
    longest_first = np.argsort(-sizes, kind="stable")
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}  # tokens still free -> the rows that have them
    rooms: list[int] = []  # the keys of rows_by_room, ascending: the best fit is found by bisection
    for index, length in zip(longest_first.tolist(), sizes[longest_first].tolist(), strict=True):
        position = bisect_left(rooms, length)
        if position == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[position]
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                del rows_by_room[room], rooms[position]
        rows[row].append(index)
        if room := room - length:
            if room not in rows_by_room:
                rows_by_room[room] = []
                insort(rooms, room)
            rows_by_room[room].append(row)
    return sorted(sorted(row) for row in rows)
