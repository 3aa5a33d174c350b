"""The optimizer's step within the backward pass: a parameter is stepped as soon as its gradient is there.

The gradient is forgotten at once, so that those of the whole model never exist together. What needs all of them before
any parameter may change, as clipping by their norm does, is not to be had.
Source: Lv et al., 2023 (arXiv:2306.09782).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchtune.distributed.mesh import MeshSizes
from torchtune.distributed.part import is_sharded, local
from torchtune.errors import Problems


def check_optimizer_in_backward(
    *, accumulation: int, clip_grad_norm: float | None, dtype: torch.dtype, sizes: MeshSizes, cpu_offload: bool
) -> None:
    """Whether a run's parameters can be stepped one by one.

    Args:
        accumulation: micro-batches per optimizer step.
        sizes: of the mesh, `shard` known.
        cpu_offload: whether FSDP keeps parameters on the host.
    Raises:
        ConfigError: they can not; all problems at once.
    """
    refusals = (
        (
            accumulation > 1,
            f"gradient_accumulation_steps={accumulation} adds up gradients over micro-batches, and none is kept so long; "
            "set it to 1, and batch_size higher",
        ),
        (
            clip_grad_norm is not None and math.isfinite(clip_grad_norm),
            f"clip_grad_norm={clip_grad_norm} needs all gradients before the first step; set it to null, or to inf, "
            "which only measures",
        ),
        (
            dtype == torch.float16,
            "dtype=fp16 leaves a step out when any gradient has overflowed, which is known too late; use dtype=bf16",
        ),
        (
            sizes.shard == 1 and sizes.replicate * sizes.context > 1,
            "ranks hold copies of the model, so that all gradients are summed after the backward pass; share it, by "
            "data_parallel_shard",
        ),
        (
            cpu_offload,
            "fsdp_cpu_offload copies gradients to the host beside the backward pass, which would wait for each; use one "
            "of the two",
        ),
    )
    problems = Problems()
    for holds, message in refusals:
        if holds:
            problems.add("optimizer_in_bwd", message)
    problems.raise_all()


class OptimizerInBackward(torch.optim.Optimizer):
    """An optimizer a parameter, each stepped when the parameter's gradient arrives.

    `param_groups` and `state_dict` are those of one optimizer over all, so schedules and checkpoints see no
    difference. One step has one backward pass.

    Args:
        params: parameter groups, as any optimizer takes them.
        build: makes an optimizer from a list of groups.
        early: the model's parameters whose gradients are whole as they arrive, and what is stepped for each: itself,
            or the share that this rank has of it. All others are stepped by `step`.

    Attributes:
        seed: what rounding at random draws from in the next step; ranks that hold the same share need the same.
        gradient_norms: of what was stepped in the backward pass before the next `step`, by what is stepped; the host
            does not wait.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        build: Callable[..., torch.optim.Optimizer],
        *,
        early: Mapping[nn.Parameter, Tensor],
    ) -> None:
        groups = list(params)
        self._inner = {
            parameter: build([{**group, "params": [parameter]}]) for group in groups for parameter in group["params"]
        }
        super().__init__(groups, next(iter(self._inner.values())).defaults)
        # By index: loading puts new groups in their place.
        group_of = {p: index for index, group in enumerate(groups) for p in group["params"]}
        self._places = {parameter: (group_of[parameter], number) for number, parameter in enumerate(self._inner)}
        self._early = dict(early)
        self.seed = 0
        self.gradient_norms: dict[Tensor, Tensor] = {}
        for parameter in self._early:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step what was not stepped in the backward pass; `closure` is not supported."""
        for stepped in self._inner:
            if stepped.grad is not None:
                self._step_one(stepped)
        self.gradient_norms = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore state."""
        super().load_state_dict({**state_dict, "state": {}})
        order = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, state in state_dict["state"].items():
            inner = self._inner[order[index]]
            inner.load_state_dict({"state": {0: state}, "param_groups": inner.state_dict()["param_groups"]})
            self.state[order[index]] = inner.state[order[index]]

    @torch.no_grad()
    def _arrived(self, parameter: nn.Parameter) -> None:
        stepped = self._early[parameter]
        assert parameter.grad is not None
        gradient, parameter.grad = local(parameter.grad), None
        if is_sharded(parameter):
            stepped.data = local(parameter.detach())  # FSDP may have put it into other memory
        stepped.grad = gradient
        self.gradient_norms[stepped] = torch.linalg.vector_norm(gradient)
        self._step_one(stepped)
        stepped.grad = None

    def _step_one(self, stepped: Tensor) -> None:
        inner, (index, number) = self._inner[stepped], self._places[stepped]
        group = self.param_groups[index]
        inner.param_groups[0].update({key: value for key, value in group.items() if key != "params"})
        # Gradients arrive between what draws for dropout, and not in the same order everywhere.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed * len(self._inner) + number)
            inner.step()
        self.state[stepped] = inner.state[stepped]
