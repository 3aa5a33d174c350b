"""One seed for everything random in a run, and the same randomness again after a resume."""

from __future__ import annotations

import random
import secrets

import numpy as np
import torch

from torchtune.distributed.process_group import broadcast_object


def draw_seed(seed: int | None) -> int:
    """`seed`, or a fresh one that all ranks share when it is None."""
    return seed if seed is not None else int(str(broadcast_object(secrets.randbelow(2**31))))


def seed_everything(seed: int, *parts: int) -> None:
    """Seed Python, numpy and torch (all devices) from `seed` and the parts that tell where in the run we are.

    Called with (seed, step, micro-batch) before each micro-batch, dropout after a resume is what it
    would have been, whatever was drawn before.
    """
    words = np.random.SeedSequence([seed, *parts]).generate_state(2, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[0]) & 0xFFFFFFFF)
    torch.manual_seed(int(words[1]) & 0x7FFFFFFFFFFFFFFF)
