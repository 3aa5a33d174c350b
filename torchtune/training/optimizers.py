"""Which parameters are trained, at which rate and decay, and in which precision the step is taken."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchtune.errors import ConfigError
from torchtune.training.optimizer_in_backward import OptimizerInBackward
from torchtune.training.precision import stochastic_round_


@dataclass(frozen=True)
class ParamGroup:
    """Parameters whose name matches `pattern` (`re.search`) get these values in place of the optimizer's.

    Besides the optimizer's own names, `lr_ratio` is what LRSchedule multiplies their rate by.
    """

    pattern: str
    values: dict[str, float]


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Stop training the parameters whose name matches one of `patterns`; return their names.

    Raises:
        ConfigError: a pattern that matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen = set()
    for pattern in patterns:
        matched = _matching(pattern, names, key="freeze")
        frozen.update(matched)
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("every parameter is frozen; nothing is left to train", key="freeze")
    return sorted(frozen)


def build_param_groups(
    trained: Mapping[str, nn.Parameter],
    groups: Sequence[ParamGroup],
    *,
    weight_decay: float | None,
    defaults: Sequence[ParamGroup] = (),
) -> list[dict[str, Any]]:
    """The optimizer's parameter groups: one per set of equal values, in the order of the model's parameters.

    Weights of two or more dimensions decay; biases and norms do not, since decay would pull them to
    zero and not towards a simpler function (Loshchilov & Hutter, 2019, arXiv:1711.05101, decay weights).
    A group that names its own `weight_decay` gets it for all that it matches.

    Args:
        trained: the parameters by name.
        defaults: what the method asks for by itself; a value that `groups` has for the same parameter wins.
    Raises:
        ConfigError: a group's pattern matches no trained parameter, or two groups match the same one.
    """
    names = list(trained)
    wished, by_method = _values_by_name(groups, names), _values_by_name(defaults, names)
    made: dict[tuple[tuple[str, float], ...], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        values = {**by_method.get(name, {}), **wished.get(name, {})}
        if "lr" in wished.get(name, {}):
            values.pop("lr_ratio", None)  # a rate that was asked for is meant as it stands
        if weight_decay and parameter.dim() < 2:
            values.setdefault("weight_decay", 0.0)
        made.setdefault(tuple(sorted(values.items())), []).append(parameter)
    return [{"params": parameters, **dict(values)} for values, parameters in made.items()]


def _values_by_name(groups: Sequence[ParamGroup], names: Sequence[str]) -> dict[str, dict[str, float]]:
    owner: dict[str, ParamGroup] = {}
    for group in groups:
        for name in _matching(group.pattern, names, key="param_groups"):
            if name in owner:
                raise ConfigError(
                    f"'{name}' matches both '{owner[name].pattern}' and '{group.pattern}'; make one of them narrower",
                    key="param_groups",
                )
            owner[name] = group
    return {name: group.values for name, group in owner.items()}


def _matching(pattern: str, names: Sequence[str], *, key: str) -> list[str]:
    try:
        matched = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise ConfigError(f"'{pattern}' is no regular expression: {error}", key=key) from error
    if not matched:
        raise ConfigError(f"'{pattern}' matches no parameter; their names are like '{names[0]}'", key=key)
    return matched


class StochasticRounding(torch.optim.Optimizer):
    """Steps bfloat16 parameters in float32 and rounds the result so that small updates survive on average.

    One inner optimizer a parameter, so that only one float32 copy of a parameter exists at a time;
    its state (moments) stays float32. `param_groups` and `state_dict` are like any optimizer's.

    Args:
        params: parameter groups, as any optimizer takes them.
        build: makes the inner optimizer from a list of groups.
    """

    def __init__(self, params: Iterable[dict[str, Any]], build: Callable[..., torch.optim.Optimizer]) -> None:
        groups = list(params)
        self._inner: dict[nn.Parameter, torch.optim.Optimizer] = {}
        self._masters: dict[nn.Parameter, nn.Parameter] = {}
        defaults: dict[str, Any] = {}
        for group in groups:
            values = {key: value for key, value in group.items() if key != "params"}
            for parameter in group["params"]:
                master = nn.Parameter(torch.empty(0, dtype=torch.float32, device=parameter.device))
                self._masters[parameter] = master
                self._inner[parameter] = build([{"params": [master], **values}])
                defaults = self._inner[parameter].defaults
        super().__init__(groups, defaults)
        self._generators: dict[torch.device, torch.Generator] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient; `closure` is not supported."""
        # Drawn from torch's generator, which the recipe seeds per step: resumable.
        seed = int(torch.randint(2**62, ()))
        for group in self.param_groups:
            values = {key: value for key, value in group.items() if key != "params"}
            for parameter in group["params"]:
                seed += 1
                if parameter.grad is not None:
                    self._step_one(parameter, values, seed)

    def _step_one(self, parameter: nn.Parameter, values: dict[str, Any], seed: int) -> None:
        inner, master = self._inner[parameter], self._masters[parameter]
        inner.param_groups[0].update(values)
        master.data = parameter.float()
        assert parameter.grad is not None
        master.grad = parameter.grad.float()
        inner.step()
        # One seed a parameter: ranks that hold the same one round it alike, whatever the shares of others are.
        device = parameter.device
        generator = self._generators.setdefault(device, torch.Generator(device)).manual_seed(seed)
        stochastic_round_(parameter.data, master.data, generator)
        master.data, master.grad = master.data.new_empty(0), None
        self.state[parameter] = inner.state[master]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore state; the inner optimizers see it through the shared dictionaries."""
        before = {parameter: parameter.dtype for parameter in self._masters}
        super().load_state_dict(state_dict)
        packed = state_dict["state"]
        order = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in enumerate(order):
            if index in packed:
                # The base class casts state to the parameter's type; the moments are float32.
                restored = {
                    key: value.to(parameter.device).clone() if torch.is_tensor(value) else value
                    for key, value in packed[index].items()
                }
                self._inner[parameter].state[self._masters[parameter]] = restored
                self.state[parameter] = restored
        assert all(parameter.dtype == dtype for parameter, dtype in before.items())


def build_optimizer(
    trained: Mapping[str, nn.Parameter],
    build: Callable[..., torch.optim.Optimizer],
    groups: Sequence[ParamGroup],
    *,
    weight_decay: float | None,
    defaults: Sequence[ParamGroup] = (),
    early: Mapping[nn.Parameter, Tensor] | None = None,
) -> torch.optim.Optimizer:
    """An optimizer over the trained parameters.

    Args:
        trained: what it steps, by name.
        build: makes the optimizer from a list of parameter groups, the options already bound.
        groups: other rates or decays by name.
        weight_decay: the optimizer's own, if it has one.
        defaults: other rates or decays that the method asks for; `groups` wins.
        early: what is stepped in the backward pass, as `OptimizerInBackward` has it; None steps all after it.
    """
    made = build_param_groups(trained, groups, weight_decay=weight_decay, defaults=defaults)
    if any(parameter.dtype == torch.bfloat16 for group in made for parameter in group["params"]):
        build = partial(StochasticRounding, build=build)
    return build(made) if early is None else OptimizerInBackward(made, build, early=early)
