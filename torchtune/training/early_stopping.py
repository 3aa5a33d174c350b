"""The best held-out loss so far, and when to give up waiting for a better one."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass
class BestLoss:
    """Follows the held-out loss. Its fields are the state that a checkpoint keeps.

    Attributes:
        loss: the lowest so far.
        step: the step that had it.
        num_without_better: evaluations since.
    """

    loss: float = math.inf
    step: int | None = None
    num_without_better: int = 0

    def update(self, loss: float, step: int, *, min_delta: float = 0.0) -> bool:
        """Take in an evaluation; returns whether it is the best so far."""
        if loss < self.loss - min_delta or self.step is None:
            self.loss, self.step, self.num_without_better = loss, step, 0
            return True
        self.num_without_better += 1
        return False

    def state_dict(self) -> dict[str, float | int | None]:
        """What a checkpoint keeps; an infinite loss is left out, since strict JSON has no name for it."""
        state = asdict(self)
        if math.isinf(self.loss):
            del state["loss"]
        return state

    @classmethod
    def from_state_dict(cls, state: dict[str, float | int | None]) -> BestLoss:
        """The tracker that `state_dict` was taken from."""
        return cls(**state)  # type: ignore[arg-type]
