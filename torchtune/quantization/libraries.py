"""The libraries that quantise: imported when a weight is first packed, and asked for by name where they are absent."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

from torchtune.errors import MissingDependencyError


def bitsandbytes(needed_for: str) -> ModuleType:
    """`bitsandbytes.functional`; its operators are then `torch.ops.bitsandbytes`.

    Raises:
        MissingDependencyError: it is not installed.
    """
    # On import it looks for a product of 4-bit weights that is published elsewhere, and warns where there is none;
    # ours are unpacked, by a kernel that it brings along.
    return _imported("bitsandbytes", "functional", needed_for, unheard=["bitsandbytes.backends.cpu.ops"])


def torchao(needed_for: str) -> ModuleType:
    """`torchao.quantization.quant_primitives`.

    Raises:
        MissingDependencyError: it is not installed.
    """
    # On import it warns of each of its CUDA kernels that this machine can't load, and torch of how it registers
    # one of its types; the functions that are used are plain torch.
    unheard = ["torchao", "torch.utils._pytree"]
    return _imported("torchao", "quantization.quant_primitives", needed_for, unheard=unheard)


def _imported(package: str, module: str, needed_for: str, *, unheard: Sequence[str]) -> ModuleType:
    try:
        with _unheard(unheard):
            return importlib.import_module(f"{package}.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise MissingDependencyError(package, extra=package, needed_for=needed_for) from error


@contextmanager
def _unheard(names: Sequence[str]) -> Iterator[None]:
    """Loggers of these names are silent below errors meanwhile."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
