"""The checkpoints of a run: what each recipe writes and reads of them besides the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from torchtune.checkpoint.background import Background
from torchtune.checkpoint.held import Held
from torchtune.checkpoint.steps import prune_steps, verify_step, write_step
from torchtune.checkpoint.training_state import TrainingState, load_training_state, save_training_state
from torchtune.data.loader import DataLoader
from torchtune.distributed.peers import Peers, open_peers
from torchtune.recipes.optimization import Optimization
from torchtune.recipes.params import FinetuneParams
from torchtune.recipes.run_folder import RunFolder, comparable
from torchtune.recipes.run_state import RunState
from torchtune.training.precision import dtype_name

WriteModel = Callable[[Path, Held], Mapping[str, Tensor]]


def verified_training_state(folder: Path) -> TrainingState:
    """What a checkpoint has to resume from, once the whole of it has been read and is as it was written.

    Raises:
        CheckpointError: names the file that is missing, cut or changed.
        RankError: another rank has found it.
    """
    with open_peers() as peers:
        verify_step(folder, peers)
    return load_training_state(folder)


class Saves:
    """The saves of a run, one after the other. A recipe holds one open from setup to cleanup, on every rank.

    Args:
        in_background: training goes on while a thread writes what was copied to the host before.
    """

    def __init__(self, output: RunFolder, *, in_background: bool = False) -> None:
        self.output = output
        self.in_background = in_background
        self._background = Background()
        self._open = ExitStack()
        self._peers: Peers | None = None

    @property
    def peers(self) -> Peers:
        """All ranks, for saving alone; all of them ask for it at the same time, at first."""
        if self._peers is None:
            self._peers = self._open.enter_context(open_peers())
        return self._peers

    @property
    def have_failed(self) -> bool:
        """Whether a save in the background has failed on this rank; `wait` raises why."""
        return self._background.has_failed

    def wait(self) -> None:
        """Until the last save is done, and stands.

        Raises:
            CheckpointError: it could not be written; earlier ones are untouched.
        """
        self._background.wait()

    def run(self, write: Callable[[], None]) -> None:
        """Write, here or in the background; the last one has been waited for."""
        if self.in_background:
            self._background.run(write)
        else:
            write()

    def __enter__(self) -> Saves:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        with self._open:
            self.wait()


def write_checkpoint(
    saves: Saves,
    params: FinetuneParams,
    state: RunState,
    optimization: Optimization,
    loader: DataLoader,
    *,
    dtype: torch.dtype,
    epoch: int | None,
    write_model: WriteModel,
    more: Mapping[str, str] | None = None,
) -> Path:
    """Write OUT/step_N/, whole or not at all, and remove those that `keep_last` has no room for.

    Args:
        dtype: what is computed in.
        epoch: the epoch that the step belongs to, for the record.
        write_model: writes the recipe's own files into the folder that it is given, from what the ranks hold; returns
            what this rank holds of the trained tensors that these files don't hold to the bit, by parameter name. All
            ranks call it; in the background where `saves` are, while training goes on.
        more: what the recipe keeps besides.
    Returns:
        The checkpoint's folder, which in the background is there once `saves.wait()` has returned.
    Raises:
        TrainingError: a step that was not looked at yet is not finite; nothing is written.
        CheckpointError: it, or the one before, could not be written; earlier ones are untouched.
    """
    saves.wait()
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
    held = Held.by(optimization.model, saves.peers, copied=saves.in_background)
    if saves.in_background:
        kept = copy.deepcopy(kept)
        optimizer_tensors = {name: tensor.to("cpu", copy=True) for name, tensor in optimizer_tensors.items()}
    best = state.best.step

    def write(folder: Path) -> None:
        tensors = {"model": write_model(folder, held), "optimizer": optimizer_tensors}
        save_training_state(folder, tensors, kept, parts=held.parts, peers=held.peers)

    def write_and_prune() -> None:
        write_step(saves.output.path, step, write, peers=held.peers)
        if held.peers.is_main:
            prune_steps(saves.output.path, params.keep_last, keep=[best or step])
        held.peers.meet()

    saves.run(write_and_prune)
    return saves.output.saved(step)
