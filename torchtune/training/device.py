"""Where a run computes."""

from __future__ import annotations

import torch

from torchtune.distributed.process_group import own_cuda_device
from torchtune.errors import ConfigError


def get_device(device: str | torch.device | None = None) -> torch.device:
    """The device of this process.

    Args:
        device: `cpu`, `cuda`, `cuda:N`, `mps`, ...; None or `auto` means CUDA if there is any, else the CPU.
    Returns:
        A device with its index; under a launcher, the CUDA device of the local rank, made the current one.
    Raises:
        ConfigError: there is no such device, or its index is not the local rank's under a launcher.
    """
    if device is None or device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"'{device}' is no device; use cpu, cuda, cuda:N or mps", key="device") from error
    if chosen.type == "cuda":
        return own_cuda_device(chosen.index)
    if chosen.type != "cpu" and not getattr(torch, chosen.type, _NoDevice).is_available():
        raise ConfigError(f"'{device}' was asked for, but this machine has none; use device=cpu", key="device")
    return chosen


class _NoDevice:
    @staticmethod
    def is_available() -> bool:
        return False
