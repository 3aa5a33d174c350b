"""How fast a run goes and how much memory it takes."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from torchtune.data.batch import Batch
from torchtune.distributed.mesh import Mesh


def count_tokens(micro_batches: Sequence[Batch], mesh: Mesh, device: torch.device) -> tuple[Tensor, Tensor]:
    """The trained tokens and all tokens of an optimizer step, on all ranks, as scalars on `device`.

    Args:
        micro_batches: as they were read; ranks that share their tokens have the same ones.
    """
    counts = torch.tensor([[batch.num_trained, batch.num_tokens] for batch in micro_batches], device=device)
    num_trained, num_tokens = mesh.data.sum(counts.sum(0)).unbind()
    return num_trained, num_tokens


class StepTimer:
    """Seconds and tokens since the last logged step, without the time that `pause` spans took.

    Evaluation and checkpoints are no training, so their time is left out of tokens per second.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start counting from now."""
        self._start = time.perf_counter()
        self._num_tokens: int | torch.Tensor = 0
        self._num_steps = 0

    def add_step(self, num_tokens: int | torch.Tensor) -> None:
        """Count an optimizer step of `num_tokens` real tokens (no padding), on all ranks together.

        A tensor stays on its device until `metrics` is called.
        """
        self._num_tokens = self._num_tokens + num_tokens
        self._num_steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time within the context out."""
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before

    def metrics(self) -> dict[str, float]:
        """`seconds` a step and `tokens_per_second` since the last call; starts the next span."""
        elapsed = time.perf_counter() - self._start
        values = {"tokens_per_second": float(self._num_tokens) / elapsed, "seconds": elapsed / max(self._num_steps, 1)}
        self.reset()
        return values


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used so far: allocated on a CUDA device, or resident of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def matmul_rate(dtype: torch.dtype, device: torch.device, *, size: int = 1024, repeats: int = 5) -> float:
    """What this machine multiplies, in GFLOP/s: the best of some square products in `dtype`."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9
