"""What resuming needs besides the model: recipe_state/ in a checkpoint, as safetensors and JSON.

Tensors stand under the checkpoint's parameter names: `exp_avg/model.layers.0.mlp.up_proj.weight`. Nothing
is pickled, so nothing in it can run code. How several ranks write and read them: state_tensors.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchtune.checkpoint.headers import read_json
from torchtune.checkpoint.state_tensors import (
    open_state_tensors,
    read_part,
    save_state_tensors,
    shape_of,
)
from torchtune.distributed.part import Part, local
from torchtune.distributed.part import parts as parts_of
from torchtune.distributed.peers import Peers
from torchtune.errors import CheckpointError, UnsupportedError

FOLDER = "recipe_state"
STATE = "state.json"
# What torch's optimizers keep for each element of a parameter: state of another shape would be used beyond its end.
ELEMENTWISE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "sum", "exp_inf", "grad_avg")


@dataclass
class TrainingState:
    """The content of recipe_state/.

    Attributes:
        tensors: groups of named tensors: `optimizer`, `model`.
        state: everything else, as JSON has it.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    state: dict[str, Any]


def save_training_state(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    parts: Mapping[str, Part] | None = None,
    peers: Peers | None = None,
) -> None:
    """Write recipe_state/ into a checkpoint's folder; groups without a tensor have no file. Every rank calls it.

    Args:
        tensors: what this rank holds.
        state: what is the same on all ranks.
        parts: which part of each parameter, by name, this rank holds; what has its shape is the same part of a whole.
        peers: the ranks that take part; by default there is this one.
    Raises:
        RankError: another rank failed.
    """
    peers = peers or Peers()
    target = folder / FOLDER
    if peers.is_main:
        target.mkdir()
    peers.meet()
    for group, named in tensors.items():
        save_state_tensors(target, group, named, parts or {}, peers)
    if peers.is_main:
        text = json.dumps(state, indent=1, ensure_ascii=False, allow_nan=False)
        (target / STATE).write_text(text, encoding="utf-8", errors="surrogateescape")


def load_training_state(step_folder: Path) -> TrainingState:
    """Read recipe_state/ of a checkpoint; its tensors are read when they are asked for.

    Raises:
        CheckpointError: it is not there.
    """
    folder = step_folder / FOLDER
    if not (folder / STATE).exists():
        raise CheckpointError("holds no training state to resume from", path=step_folder)
    return TrainingState(open_state_tensors(folder), read_json(folder / STATE))


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
    *,
    parts: Mapping[str, Part] | None = None,
) -> None:
    """Give an optimizer the state that `optimizer_tensors` took, to the bit; of `StateTensors` no more than it has.

    Args:
        parts: which part of each parameter, by name, the optimizer has; by default all of them.
    Raises:
        CheckpointError: the state belongs to other parameters.
        UnsupportedError: it can't be split as the parameters are.
    """
    shapes = {names[parameter]: parameter.shape for group in optimizer.param_groups for parameter in group["params"]}
    place = {name: index for index, name in enumerate(shapes)}
    held = {name: (parts or {}).get(name) or Part.all_of(shape) for name, shape in shapes.items()}
    state: dict[int, dict[str, Any]] = {}
    for key in [*tensors, *others]:
        kind, _, name = key.partition("/")
        if name not in place:
            raise CheckpointError(f"the optimizer's state holds '{key}', but '{name}' is not trained in this run")
        value = _part_of_state(tensors, key, held[name]) if key in tensors else others[key]
        state.setdefault(place[name], {})[kind] = value
    if state and len(state) != len(place):
        absent = next(name for name, index in place.items() if index not in state)
        raise CheckpointError(f"the optimizer's state has nothing of '{absent}', which is trained in this run")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _part_of_state(tensors: Mapping[str, Tensor], key: str, part: Part) -> Tensor:
    """What belongs to a part of a parameter, of the state that belongs to the whole."""
    kind, _, name = key.partition("/")
    shape = shape_of(tensors, key)
    if kind in ELEMENTWISE and shape != part.whole:
        raise CheckpointError(f"the optimizer's state has '{key}' {shape}, but '{name}' is {part.whole} in this run")
    if shape == part.whole:
        return read_part(tensors, key, part)
    if not part.is_whole and math.prod(shape) > 1:
        raise UnsupportedError(
            f"the optimizer's state '{key}' {shape} has no value for each element of '{name}' {part.whole}, so that it "
            "can't be split as this run splits that; use another optimizer, or data_parallel_shard=1"
        )
    return tensors[key]


def load_masters(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give parameters the values that the model's files had rounded, each rank its part.

    Raises:
        CheckpointError: a tensor of another model.
    """
    held, named = parts_of(model), dict(model.named_parameters())
    for name in tensors:
        shape = shape_of(tensors, name)
        if name not in named or held[name].whole != shape:
            raise CheckpointError(f"the training state holds '{name}' {shape}, which is not in this model")
        local(named[name].data).copy_(read_part(tensors, name, held[name]))
