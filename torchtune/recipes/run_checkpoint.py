"""The checkpoints of a run: what each recipe writes and reads of them besides the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from torchtune.checkpoint.steps import prune_steps, verify_step, write_step
from torchtune.checkpoint.training_state import TrainingState, load_training_state, save_training_state
from torchtune.data.loader import DataLoader
from torchtune.distributed.process_group import barrier, is_main
from torchtune.recipes.optimization import Optimization
from torchtune.recipes.params import FinetuneParams
from torchtune.recipes.run_folder import RunFolder, comparable
from torchtune.recipes.run_state import RunState
from torchtune.training.precision import dtype_name


def verified_training_state(folder: Path) -> TrainingState:
    """What a checkpoint has to resume from, once the whole of it has been read and is as it was written.

    Raises:
        CheckpointError: names the file that is missing, cut or changed.
    """
    if is_main():  # one rank reads it whole; the others end when it does
        verify_step(folder)
    barrier()
    return load_training_state(folder)


def write_checkpoint(
    output: RunFolder,
    params: FinetuneParams,
    state: RunState,
    optimization: Optimization,
    loader: DataLoader,
    *,
    dtype: torch.dtype,
    epoch: int | None,
    write_model: Callable[[Path], Mapping[str, Tensor]],
    more: Mapping[str, str] | None = None,
) -> Path:
    """Write OUT/step_N/, whole or not at all, and remove those that `keep_last` has no room for.

    Args:
        dtype: what is computed in.
        epoch: the epoch that the step belongs to, for the record.
        write_model: writes the recipe's own files into the folder that it is given; returns the trained tensors
            that these don't hold to the bit, by parameter name. Called on one rank.
        more: what the recipe keeps besides.
    Returns:
        The checkpoint's folder.
    Raises:
        TrainingError: a step that was not looked at yet is not finite; nothing is written.
        CheckpointError: it could not be written; earlier ones are untouched.
    """
    optimization.check_pending()
    step = state.total_training_steps
    optimizer_tensors, optimizer_state = optimization.state_dict()
    kept = {
        "params": comparable(params),
        "dtype": dtype_name(dtype),
        "epoch": epoch,
        **state.state_dict(),
        "dataloader": loader.state_dict(),
        **optimizer_state,
        **(more or {}),
    }

    def write(folder: Path) -> None:
        tensors = {"model": write_model(folder), "optimizer": optimizer_tensors}
        save_training_state(folder, tensors, kept)

    if is_main():
        write_step(output.path, step, write)
        prune_steps(output.path, params.keep_last, keep=[state.best.step or step])
    barrier()
    return output.saved(step)
