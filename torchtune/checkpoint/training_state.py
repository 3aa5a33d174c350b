"""What resuming needs besides the model: recipe_state/ in a checkpoint, as safetensors and JSON.

Tensors stand under the checkpoint's parameter names: `exp_avg/model.layers.0.mlp.up_proj.weight`. Nothing
is pickled, so nothing in it can run code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from torchtune.checkpoint.headers import read_json
from torchtune.errors import CheckpointError

FOLDER = "recipe_state"
STATE = "state.json"
# What torch's optimizers keep for each element of a parameter: state of another shape would be used beyond its end.
ELEMENTWISE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "sum", "exp_inf", "grad_avg")


@dataclass
class TrainingState:
    """The content of recipe_state/.

    Attributes:
        tensors: groups of named tensors, a file each: `optimizer`, `model`.
        state: everything else, as JSON has it.
    """

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_training_state(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Write recipe_state/ into a checkpoint's folder; groups without a tensor have no file."""
    target = folder / FOLDER
    target.mkdir()
    for group, named in tensors.items():
        if named:
            on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
            save_file(on_cpu, target / f"{group}.safetensors")
    text = json.dumps(state, indent=1, ensure_ascii=False, allow_nan=False)
    (target / STATE).write_text(text, encoding="utf-8", errors="surrogateescape")


def load_training_state(step_folder: Path) -> TrainingState:
    """Read recipe_state/ of a checkpoint.

    Raises:
        CheckpointError: it is not there.
    """
    folder = step_folder / FOLDER
    if not (folder / STATE).exists():
        raise CheckpointError("holds no training state to resume from", path=step_folder)
    files = sorted(folder.glob("*.safetensors"))
    return TrainingState({file.stem: load_file(file) for file in files}, read_json(folder / STATE))


def run_params(step_folder: Path) -> dict[str, Any]:
    """The params of the run that wrote a checkpoint, as far as they decide what comes out; nothing without them."""
    state = step_folder / FOLDER / STATE
    return dict(read_json(state).get("params", {})) if state.exists() else {}


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state by parameter name: its tensors, and what is no tensor.

    Rates and other options are not part of it: they come from the params.

    Args:
        names: the name of each parameter.
    """
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            (tensors if torch.is_tensor(value) else others)[f"{key}/{order[index]}"] = value
    return tensors, others


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    names: Mapping[nn.Parameter, str],
    tensors: Mapping[str, Tensor],
    others: Mapping[str, Any],
) -> None:
    """Give an optimizer the state that `optimizer_tensors` took, to the bit.

    Raises:
        CheckpointError: the state belongs to other parameters.
    """
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    place = {name: index for index, name in enumerate(order)}
    shapes = {names[parameter]: parameter.shape for group in optimizer.param_groups for parameter in group["params"]}
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **others}.items():
        kind, _, name = key.partition("/")
        if name not in place:
            raise CheckpointError(f"the optimizer's state holds '{key}', but '{name}' is not trained in this run")
        shape = shapes[name]
        if torch.is_tensor(value) and kind in ELEMENTWISE and value.shape != shape:
            raise CheckpointError(
                f"the optimizer's state has '{key}' {tuple(value.shape)}, but '{name}' is {tuple(shape)} in this run"
            )
        state.setdefault(place[name], {})[kind] = value
    if state and len(state) != len(order):
        absent = next(name for name, index in place.items() if index not in state)
        raise CheckpointError(f"the optimizer's state has nothing of '{absent}', which is trained in this run")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def load_masters(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give parameters the values that the model's files had rounded.

    Raises:
        CheckpointError: a tensor of another model.
    """
    named = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name not in named or named[name].shape != tensor.shape:
            raise CheckpointError(
                f"the training state holds '{name}' {tuple(tensor.shape)}, which is not in this model"
            )
        named[name].data.copy_(tensor)
