"""Learning-rate schedules, as functions of progress.

    rate of step k  =  peak x factor(k)
    warm-up         k / W                                  for k = 1 .. W
    after it        m + (1 - m) x shape(x)                 x from 0 (end of warm-up) to 1 (last step)
    shape(x)        cosine: (1 + cos(pi x)) / 2    linear: 1 - x    constant: 1

W is `num_warmup_steps`, m is `min_lr_ratio`. Steps count from 1, so the first rate is above zero; the
last step has x = 1, so it runs at the floor m. Progress is step / total steps where those are known,
else rows consumed / rows of all epochs; nothing here remembers anything, so a resume has nothing to restore.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

SHAPES = {
    "cosine": lambda x: (1.0 + math.cos(math.pi * x)) / 2.0,
    "linear": lambda x: 1.0 - x,
    "constant": lambda x: 1.0,
}


def lr_factor(
    step: int,
    progress: float,
    *,
    name: str = "cosine",
    num_warmup_steps: int = 0,
    warmup_progress: float = 0.0,
    min_lr_ratio: float = 0.0,
) -> float:
    """What the peak rate is multiplied by in optimizer step `step`.

    Args:
        step: the optimizer step about to be made, from 1.
        progress: how far the run is once this step is made, over 0 to 1.
        name: `cosine`, `linear` or `constant`, the decay after the warm-up.
        num_warmup_steps: steps of linear warm-up.
        warmup_progress: the progress when the warm-up ended; the decay runs from there to 1.
        min_lr_ratio: the floor, as a share of the peak.
    """
    if step <= num_warmup_steps:
        return step / num_warmup_steps
    span = 1.0 - warmup_progress
    x = 1.0 if span <= 0 else min(max((progress - warmup_progress) / span, 0.0), 1.0)
    if name == "constant":
        return 1.0
    return min_lr_ratio + (1.0 - min_lr_ratio) * SHAPES[name](x)


@dataclass
class LRSchedule:
    """Sets an optimizer's rates before each step. Each group keeps its own peak: its `lr`, times its `lr_ratio`.

    Attributes:
        name, num_warmup_steps, min_lr_ratio: as in `lr_factor`.
        warmup_progress: the progress when the warm-up ended. A checkpoint keeps it, since where progress
            is counted in rows it can't be known beforehand.
    """

    optimizer: torch.optim.Optimizer
    name: str
    num_warmup_steps: int
    min_lr_ratio: float
    warmup_progress: float = 0.0

    def __post_init__(self) -> None:
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"] * group.get("lr_ratio", 1.0))

    def set_lr(self, step: int, progress: float) -> float:
        """Set the rates for optimizer step `step` (from 1), after which the run is at `progress`; returns the first."""
        if step <= self.num_warmup_steps:
            self.warmup_progress = progress
        factor = lr_factor(
            step,
            progress,
            name=self.name,
            num_warmup_steps=self.num_warmup_steps,
            warmup_progress=self.warmup_progress,
            min_lr_ratio=self.min_lr_ratio,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        return float(self.optimizer.param_groups[0]["lr"])
