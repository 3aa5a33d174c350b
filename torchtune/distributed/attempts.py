"""What a launcher tells the processes that it starts, and starts again when one is lost, through the environment."""

from __future__ import annotations

import os
import time

from torchtune.distributed.process_group import gather_objects

LAUNCHED_AT = "TORCHTUNE_LAUNCHED_AT"
RESTARTED = "TORCHTUNE_RESTARTED"


def launched_at() -> str:
    """When the run was launched, as `20260131-235959`: the same on all ranks, and in every attempt."""
    own = os.environ.get(LAUNCHED_AT) or time.strftime("%Y%m%d-%H%M%S")
    return min(gather_objects(own))  # each machine has a launcher


def is_restarted() -> bool:
    """Whether an elastic agent has started these processes before: one was lost, or a machine came or went."""
    # torch counts only what failed on the agent's own machine, so the ranks need not agree.
    own = RESTARTED in os.environ or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return any(gather_objects(own))
