"""The C library's allocator, told that a training step frees only to allocate the same again."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# mallopt(3): which option, and its value by default.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
DEFAULTS = {TRIM_THRESHOLD: 128 * 1024, MMAP_THRESHOLD: 128 * 1024, MMAP_MAX: 65536}
KEEPING = {TRIM_THRESHOLD: 2**31 - 1, MMAP_THRESHOLD: 1 << 30, MMAP_MAX: 0}


@contextmanager
def keep_freed_memory(device: torch.device) -> Iterator[None]:
    """On a CPU with glibc, keep what is freed within this block; elsewhere do nothing.

    By default large tensors are given back to the system as they are freed, which then clears the same pages
    for the next step. Afterwards all is as before, and what is free is given back.
    """
    libc = ctypes.CDLL(None) if device.type == "cpu" and sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):
        yield
        return
    assert libc is not None
    for option, value in KEEPING.items():
        libc.mallopt(option, value)
    try:
        yield
    finally:
        for option, value in DEFAULTS.items():
            libc.mallopt(option, value)
        libc.malloc_trim(0)
