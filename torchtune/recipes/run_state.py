"""How far a run is, and what makes it the same run again after a resume."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from torchtune.recipes import choices
from torchtune.recipes.params import FinetuneParams
from torchtune.training.early_stopping import BestLoss
from torchtune.training.seed import draw_seed


@dataclass
class RunState:
    """The state of a recipe: what a checkpoint keeps besides tensors and what the blocks keep themselves.

    Attributes:
        seed: of order, dropout and splits.
        started: the time that chat templates are told.
        total_epochs: epochs of the whole run, from the params; as good as endless where only steps count.
        max_steps_per_epoch: optimizer steps after which an epoch ends, from the params.
        epochs_run: epochs that are done.
        steps_in_epoch: optimizer steps of the current epoch that are done.
        total_training_steps: optimizer steps that are done.
        best: the best held-out loss so far.
    """

    seed: int
    started: datetime
    total_epochs: int
    max_steps_per_epoch: int | None = None
    epochs_run: int = 0
    steps_in_epoch: int = 0
    total_training_steps: int = 0
    best: BestLoss = field(default_factory=BestLoss)

    @classmethod
    def of(cls, params: FinetuneParams) -> RunState:
        """The state of a run that has not begun."""
        total_epochs = choices.choose_epochs(params) or sys.maxsize
        return cls(draw_seed(params.seed), datetime.now(), total_epochs, params.max_steps_per_epoch)

    def count_step(self) -> None:
        """An optimizer step is done."""
        self.total_training_steps += 1
        self.steps_in_epoch += 1

    def end_epoch(self, epoch: int) -> None:
        """`epoch`, counted from 0, is done."""
        self.epochs_run, self.steps_in_epoch = epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON has it. How long the run is stays with the params."""
        return {
            "seed": self.seed,
            "started": self.started.isoformat(),
            "epochs_run": self.epochs_run,
            "steps_in_epoch": self.steps_in_epoch,
            "total_training_steps": self.total_training_steps,
            "best": self.best.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; other keys are left alone."""
        self.seed = state["seed"]
        self.started = datetime.fromisoformat(state["started"])
        self.epochs_run = state["epochs_run"]
        self.steps_in_epoch = state["steps_in_epoch"]
        self.total_training_steps = state["total_training_steps"]
        self.best = BestLoss.from_state_dict(state["best"])
