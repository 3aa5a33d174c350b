"""The founding text's door: its names, from their homes. Nothing in the package imports it."""

from __future__ import annotations

import importlib
from typing import Any

HOMES = {
    "TuneArgumentParser": "torchtune.config.argument_parser",
    "get_device": "torchtune.training.device",
    "get_dtype": "torchtune.training.precision",
    "init_process_group": "torchtune.distributed.process_group",
}

__all__ = ["TuneArgumentParser", "get_device", "get_dtype", "init_process_group"]


def __getattr__(name: str) -> Any:
    # On first use, so that the door costs nothing to those who only pass by.
    if name in HOMES:
        return getattr(importlib.import_module(HOMES[name]), name)
    raise AttributeError(f"module 'torchtune.utils' has no attribute '{name}'")
