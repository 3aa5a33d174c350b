"""Where the lines of a file lie."""

from __future__ import annotations

import mmap

import numpy as np

CHUNK_BYTES = 1 << 22
WHITESPACE = b" \t\r\n"


def index_lines(data: mmap.mmap, begin: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Byte offsets where lines that are not blank start and end, and their numbers from 1."""
    line_ends = []
    view = np.frombuffer(data, dtype=np.uint8)
    for offset in range(begin, len(data), CHUNK_BYTES):
        line_ends.append(np.flatnonzero(view[offset : offset + CHUNK_BYTES] == ord("\n")) + offset)
    ends = np.append(np.concatenate(line_ends), len(data))
    starts = np.append(begin, ends[:-1] + 1)
    lines = np.arange(1, len(starts) + 1)
    kept = not_blank(data, starts, ends)
    return starts[kept], ends[kept], lines[kept]


def not_blank(data: mmap.mmap, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Which of the regions hold more than white space, bool."""
    # Only regions that begin with white space (or end at once) can be blank, and few do.
    firsts = np.frombuffer(data, dtype=np.uint8)[np.minimum(starts, len(data) - 1)]
    blank = starts >= ends
    for line in np.flatnonzero(~blank & np.isin(firsts, np.frombuffer(WHITESPACE, np.uint8))):
        blank[line] = not data[starts[line] : ends[line]].strip(WHITESPACE)
    return ~blank
