"""torch.compile without the minutes that generated code takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch
from torch import nn

from torchtune.training.compiling import apply_compile


@contextmanager
def traced() -> Iterator[None]:
    """What is compiled here is traced and differentiated as ever, and run operator by operator."""
    with patch("torch.compile", partial(torch.compile, backend="aot_eager")):
        yield


def apply_traced(layers: nn.ModuleList) -> None:
    """`apply_compile`, traced alone."""
    with traced():
        apply_compile(layers)
