"""What happens to gradients between the backward pass and the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from torchtune.distributed.part import local
from torchtune.distributed.process_group import sum_over_ranks, world_size
from torchtune.errors import TrainingError

MAX_ROWS_NAMED = 20
MAX_PARAMETERS_NAMED = 5


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None, norm: torch.Tensor) -> None:
    """Scale gradients whose norm is `norm` down to `max_norm`, in place; None and infinity leave them alone."""
    if max_norm is not None and math.isfinite(max_norm):
        nn.utils.clip_grads_with_norm_([p for p in parameters if p.grad is not None], max_norm, norm)


def check_all_reached(model: nn.Module, *, stepped: Collection[str] = ()) -> None:
    """After a backward pass: every parameter that is trained has a gradient, on one rank at least.

    A gradient of zeros counts: a part that no token went through got one. None at all says that autograd
    never came there, as with reentrant activation checkpointing over frozen embeddings; such a run would go
    on, and train half of what it says. Ranks are asked together, since one without a trained token has no
    gradient of its head.

    Args:
        stepped: names of parameters whose gradient came, and is gone.
    Raises:
        TrainingError: names the first parameters without; on all ranks.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    reached = [parameter.grad is not None or name in stepped for name, parameter in trained]
    if world_size() > 1:
        reached = sum_over_ranks(torch.tensor(reached, dtype=torch.int32, device=trained[0][1].device)).tolist()
    missed = [name for (name, _), count in zip(trained, reached, strict=True) if not count]
    if missed:
        more = f" and {len(missed) - MAX_PARAMETERS_NAMED} more" if len(missed) > MAX_PARAMETERS_NAMED else ""
        raise TrainingError(
            f"{len(missed)} of {len(trained)} trained parameters got no gradient in the first step, so they would "
            f"stay as they are: {', '.join(missed[:MAX_PARAMETERS_NAMED])}{more}. Nothing was changed. Where the loss "
            "does not depend on them, name them in freeze."
        )


@dataclass
class _Pending:
    step: int
    losses: list[torch.Tensor]
    grad_norm: torch.Tensor
    rows: Sequence[Sequence[str]]


@dataclass
class FiniteGuard:
    """Stops a run whose loss or gradient is not finite, naming the step, the rows and the parameter.

    A step is added as it is computed and checked when the host waits for the device anyway; nothing is
    saved unchecked, so the last checkpoint is always a good one.

    Attributes:
        checks_gradients: whether a gradient norm that is not finite stops the run too.
    """

    checks_gradients: bool = True
    _pending: list[_Pending] = field(default_factory=list)

    def add(
        self, step: int, losses: list[torch.Tensor], grad_norm: torch.Tensor, rows: Sequence[Sequence[str]]
    ) -> None:
        """Remember a step: the summed loss of each micro-batch and the rows that each was made from."""
        self._pending.append(_Pending(step, losses, grad_norm, rows))

    def check(self, model: nn.Module) -> None:
        """Wait for the device and look at all steps since the last check.

        Raises:
            TrainingError: one of them had a loss or a gradient that is not finite.
        """
        pending, self._pending = self._pending, []
        for step in pending:
            losses = [loss.item() for loss in step.losses]
            norm = step.grad_norm.item() if self.checks_gradients else 0.0
            if all(map(math.isfinite, losses)) and math.isfinite(norm):
                continue
            raise TrainingError(_diagnosis(step, losses, norm, model))


def _diagnosis(step: _Pending, losses: list[float], norm: float, model: nn.Module) -> str:
    bad = [rows for rows, loss in zip(step.rows, losses, strict=True) if not math.isfinite(loss)]
    named = [row for rows in (bad or step.rows) for row in rows]
    more = f" and {len(named) - MAX_ROWS_NAMED} more" if len(named) > MAX_ROWS_NAMED else ""
    # This rank's share of it: the other ranks may not be asking.
    parameter = next(
        (
            name
            for name, p in model.named_parameters()
            if p.grad is not None and not bool(local(p.grad).isfinite().all())
        ),
        None,
    )
    return (
        f"step {step.step}: the summed loss is {sum(losses)} and the gradient norm {norm}; the run stops here and this step "
        f"is not kept. Rows: {', '.join(named[:MAX_ROWS_NAMED])}{more}."
        + (f" First parameter with such a gradient: {parameter}." if parameter else "")
        + " Lower optimizer.lr, lengthen the warm-up, or use dtype=fp32; resume_from_checkpoint=true goes on from "
        "the last checkpoint."
    )
