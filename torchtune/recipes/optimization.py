"""The optimizer and what belongs to its step: rates, loss scale, the gradients of all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchtune.checkpoint.training_state import TrainingState, load_optimizer_tensors, optimizer_tensors
from torchtune.config.component import instantiate
from torchtune.data.batch import Batch
from torchtune.data.loader import DataLoader
from torchtune.distributed.mesh import Mesh
from torchtune.distributed.part import parts
from torchtune.distributed.process_group import world_size
from torchtune.errors import ConfigError
from torchtune.parallel.gradients import GradientSums
from torchtune.recipes import choices
from torchtune.recipes.params import FinetuneParams
from torchtune.training.gradients import FiniteGuard, check_all_reached, clip_gradients
from torchtune.training.lr_schedulers import LRSchedule
from torchtune.training.optimizer_in_backward import OptimizerInBackward
from torchtune.training.optimizers import ParamGroup, build_optimizer
from torchtune.training.seed import seed_everything
from torchtune.training.stepped import SteppedParameters

# Optimizers whose step of an element depends on the others of its matrix.
WHOLE_MATRICES = ("Muon", "Adafactor")


class Optimization:
    """What stands around forward and backward in an optimizer step.

        lr = optimization.set_lr(step)
        for batch in micro_batches:
            optimization.scaled(loss).backward()
        grad_norm = optimization.gather_gradients()
        optimization.check_finite(step, losses, grad_norm, micro_batches)
        optimization.clip_gradients(grad_norm)
        optimization.step(seed, step)

    Args:
        model: its parameters with `requires_grad` are trained.
        mesh: the ranks that the model is spread over.
        loader: gives the number of steps, or where that is not known beforehand, of rows.
        device: where the model is.
        dtype: what is computed in; fp16 scales its loss.
        default_lr: the peak rate of AdamW where the params name none.
        groups: the recipe's own rates and decays by name pattern; those of the params come before them.
    Raises:
        ConfigError: a pattern of `param_groups` matches nothing, or two match the same parameter.

    Attributes:
        model: as given.
        optimizer: torch's.
        total_steps: optimizer steps of the whole run; None where only the data's end will tell.
    """

    def __init__(
        self,
        model: nn.Module,
        params: FinetuneParams,
        loader: DataLoader,
        *,
        mesh: Mesh,
        device: torch.device,
        dtype: torch.dtype,
        default_lr: float,
        groups: Sequence[ParamGroup] = (),
    ) -> None:
        self.model = model
        self._params = params
        self._loader = loader
        self._device = device
        self._parameters = SteppedParameters(model)
        self._sums = GradientSums(model, mesh)
        options = choices.optimizer_options(params, default_lr)
        _refuse_whole_matrices(options["_component_"], mesh)
        self.optimizer = build_optimizer(
            self._parameters.by_name,
            partial(instantiate, options),
            choices.param_groups(params),
            defaults=groups,
            weight_decay=options.get("weight_decay"),
            early=self._early() if params.optimizer_in_bwd else None,
        )
        self.total_steps = choices.count_steps(params, loader)
        self._lr_schedule = LRSchedule(
            self.optimizer,
            name=params.lr_scheduler.name,
            num_warmup_steps=choices.choose_warmup(params.lr_scheduler.num_warmup_steps, self.total_steps),
            min_lr_ratio=params.lr_scheduler.min_lr_ratio,
        )
        self.grad_scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        # fp16's loss scale makes gradients overflow on purpose; such a step is skipped, not wrong.
        self._guard = FiniteGuard(checks_gradients=not self.grad_scaler.is_enabled())
        self._is_first_step = True

    def decided(self) -> dict[str, Any]:
        """What was chosen where the params left it open, for the record."""
        return {
            "lr": self.optimizer.param_groups[0]["initial_lr"],
            "steps": self.total_steps,
            "num_warmup_steps": self._lr_schedule.num_warmup_steps,
        }

    def set_lr(self, step: int) -> float:
        """Set the rates for optimizer step `step`, counted from 1; returns the first group's."""
        if isinstance(self.optimizer, OptimizerInBackward):
            self.optimizer.seed = step  # of rounding, which begins before `step` is called
        return self._lr_schedule.set_lr(step, choices.progress(step, self.total_steps, self._loader, self._params))

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to call `backward` on: larger in fp16, where small gradients would be rounded to zero."""
        return self.grad_scaler.scale(loss)

    def gather_gradients(self) -> Tensor:
        """Sum the gradients over all ranks and undo the loss scale; returns their norm, for which nobody waits.

        Raises:
            TrainingError: in the run's first step a trained parameter got no gradient.
        """
        if self._is_first_step:
            check_all_reached(self.model, stepped=self._stepped_early())  # before the sum, which fills in zeros
            self._is_first_step = False
        self._parameters.take_gradients()
        self._sums.sum(self._parameters.by_name)
        self.grad_scaler.unscale_(self.optimizer)
        self._agree_on_overflow()
        return self._sums.norm(self._parameters.by_name, self._device, stepped=self._norms_of_stepped())

    def _early(self) -> dict[nn.Parameter, Tensor]:
        """What can be stepped as its gradient arrives: each parameter, and what this rank holds of it."""
        whole = self._sums.whole_at_once
        return {self.model.get_parameter(name): self._parameters.by_name[name] for name in sorted(whole)}

    def _norms_of_stepped(self) -> Mapping[Tensor, Tensor]:
        """Gradient norms of what was stepped in the backward pass."""
        return self.optimizer.gradient_norms if isinstance(self.optimizer, OptimizerInBackward) else {}

    def _stepped_early(self) -> list[str]:
        norms = self._norms_of_stepped()
        return [name for name, parameter in self._parameters.by_name.items() if parameter in norms]

    def _agree_on_overflow(self) -> None:
        """fp16: a rank skips the step where the gradients of another one's share have overflowed."""
        if self.grad_scaler.is_enabled() and world_size() > 1:
            for found in self.grad_scaler._found_inf_per_device(self.optimizer).values():
                dist.all_reduce(found, dist.ReduceOp.MAX)

    def check_finite(self, step: int, losses: list[Tensor], grad_norm: Tensor, micro_batches: list[Batch]) -> None:
        """Stop before a loss or gradient that is not finite reaches the weights; off the CPU, before it is kept.

        Args:
            losses: the summed loss of each micro-batch.
        Raises:
            TrainingError: names the step, the rows and the parameter.
        """
        self._guard.add(step, losses, grad_norm, [batch.sources for batch in micro_batches])
        if self._device.type == "cpu" or step % self._params.log_every_n_steps == 0:
            self.check_pending()  # elsewhere the host would wait for the device

    def check_pending(self) -> None:
        """Wait for the device and look at the steps that `check_finite` has put off; nothing is saved before.

        Raises:
            TrainingError: as `check_finite`.
        """
        self._guard.check(self.model)

    def clip_gradients(self, grad_norm: Tensor) -> None:
        """Scale gradients of norm `grad_norm` down to `clip_grad_norm`."""
        clip_gradients(self._parameters.by_name.values(), self._params.clip_grad_norm, grad_norm)

    def step(self, *seed: int) -> None:
        """Change the weights, and forget the gradients.

        Args:
            seed: for parameters in bf16, that are rounded at random: alike on all ranks, and in a resumed run.
        """
        seed_everything(*seed)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        self._parameters.forget_gradients()

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint keeps: tensors by parameter name, and what JSON has room for."""
        tensors, others = optimizer_tensors(self.optimizer, self._names())
        return tensors, {
            "warmup_progress": self._lr_schedule.warmup_progress,
            "grad_scaler": self.grad_scaler.state_dict(),
            "optimizer": others,
        }

    def load_state_dict(self, saved: TrainingState) -> None:
        """Go on from a checkpoint, to the bit.

        Raises:
            CheckpointError: its optimizer state belongs to other parameters.
        """
        tensors = saved.tensors.get("optimizer", {})
        others = saved.state["optimizer"]
        load_optimizer_tensors(self.optimizer, self._names(), tensors, others, parts=parts(self.model))
        self._lr_schedule.warmup_progress = saved.state["warmup_progress"]
        self.grad_scaler.load_state_dict(saved.state["grad_scaler"])

    def _names(self) -> dict[nn.Parameter, str]:
        return {parameter: name for name, parameter in self._parameters.by_name.items()}


def _refuse_whole_matrices(component: str, mesh: Mesh) -> None:
    sizes = mesh.sizes
    if component.rpartition(".")[2] in WHOLE_MATRICES and (sizes.shard, sizes.tensor, sizes.expert) != (1, 1, 1):
        raise ConfigError(
            f"{component} looks at whole matrices, and each rank would have a share of each; use "
            "data_parallel_replicate alone, or an optimizer that treats each element for itself, as AdamW",
            key="optimizer",
        )
