"""The torch profiler on chosen steps of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from torchtune.distributed.process_group import rank

TOP_OPERATORS = 30


class StepProfiler(Protocol):
    """What the loop calls after each step."""

    def step(self) -> None:
        """A step is done."""


class _Off:
    def step(self) -> None:
        """Nothing is profiled."""


@contextmanager
def setup_torch_profiler(
    *,
    enabled: bool,
    output_dir: Path,
    cpu: bool = True,
    cuda: bool = True,
    profile_memory: bool = False,
    with_stack: bool = False,
    record_shapes: bool = True,
    with_flops: bool = False,
    wait_steps: int = 5,
    warmup_steps: int = 3,
    active_steps: int = 2,
    num_cycles: int = 1,
) -> Iterator[StepProfiler]:
    """Profile `active_steps` steps after `wait_steps` + `warmup_steps`; once, or `num_cycles` times (0: always).

    Each cycle writes output_dir/iteration_<step>/rank<r>_trace.json (for chrome://tracing or Perfetto) and
    rank<r>_top_operators.txt.
    """
    if not enabled:
        yield _Off()
        return
    from torch.profiler import ProfilerActivity, profile, schedule

    activities = [ProfilerActivity.CPU] if cpu else []
    if cuda and torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)

    def write(finished: Any) -> None:
        folder = output_dir / f"iteration_{finished.step_num}"
        folder.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(folder / f"rank{rank()}_trace.json"))
        sort_by = "self_cuda_time_total" if ProfilerActivity.CUDA in activities else "self_cpu_time_total"
        table = finished.key_averages().table(sort_by=sort_by, row_limit=TOP_OPERATORS)
        (folder / f"rank{rank()}_top_operators.txt").write_text(table, encoding="utf-8")

    with profile(
        activities=activities,
        schedule=schedule(wait=wait_steps, warmup=warmup_steps, active=active_steps, repeat=num_cycles),
        on_trace_ready=write,
        profile_memory=profile_memory,
        with_stack=with_stack,
        record_shapes=record_shapes,
        with_flops=with_flops,
    ) as profiler:
        yield profiler
