"""What happens between steps, with steps that cost nothing."""

from contextlib import ExitStack

import pytest
import torch

from torchtune.errors import DataError
from torchtune.recipes.full_finetune import FullFinetuneParams
from torchtune.recipes.run_checkpoint import Saves
from torchtune.recipes.run_folder import RunFolder
from torchtune.recipes.run_state import RunState
from torchtune.recipes.upkeep import Upkeep
from torchtune.training.metric_logging import MetricLoggers


class Steps:
    """A loader of so many empty steps an epoch, whose last rows make none: it is never known to be the last step."""

    rows_consumed, num_rows = 0, 10

    def __init__(self, num_steps, error_after=None):
        self.num_steps = num_steps
        self.error_after = error_after
        self.epochs = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        for index in range(self.num_steps):
            if index == self.error_after:
                raise DataError("a bad row")
            yield []


@pytest.fixture
def run(tmp_path):
    """Run a loop without training; returns its state, its loader, and (epoch, step) of each save."""

    def loop(steps, state=None, **keys):
        out = tmp_path / "out"
        params = FullFinetuneParams(model_checkpoint="none", dataset="none", output_dir=str(out), **keys)
        state, saves = state or RunState.of(params), []

        def save(epoch):
            saves.append((epoch, state.total_training_steps))
            return output.saved(state.total_training_steps)

        output = RunFolder(params, "test")
        with ExitStack() as until:
            upkeep = Upkeep(
                *(params, state, output, steps, MetricLoggers([])),
                device=torch.device("cpu"),
                total_steps=None,
                evaluate=None,
                measure=None,
                sample=None,
                save=save,
                saves=until.enter_context(Saves(output)),
                until=until,
            )
            if upkeep.nothing_is_left():
                return state, saves
            try:
                with upkeep.running():
                    for epoch in range(state.epochs_run, state.total_epochs):
                        for _ in upkeep.steps_of_epoch(epoch):
                            if upkeep.after_step(epoch, {"loss": 1.0, "tokens": 1}):
                                return state, saves
            except DataError:
                saves.append("error")
        return state, saves

    return loop


def test_an_epoch_that_ends_unannounced_is_counted_and_the_last_is_saved(run):
    """Rows after the last step that give none: only the loader's end tells."""
    state, saves = run(steps := Steps(2), epochs=2)
    assert (state.epochs_run, state.steps_in_epoch, state.total_training_steps) == (2, 0, 4)
    assert saves == [(1, 4)]
    assert steps.epochs == [0, 1]


def test_the_last_step_is_not_saved_twice(run):
    """It was due by save_every_n_steps already."""
    assert run(Steps(2), epochs=1, save_every_n_steps=1)[1] == [(0, 1), (0, 2)]


def test_max_steps_and_max_steps_per_epoch_end_what_they_say(run):
    """Five steps at most, two an epoch: the third epoch is begun."""
    state, saves = run(Steps(9), max_steps=5, max_steps_per_epoch=2)
    assert (state.epochs_run, state.steps_in_epoch, state.total_training_steps) == (2, 1, 5)
    assert saves == [(2, 5)]


def test_a_bad_row_ends_the_run_saved(run):
    """At the step boundary before it; a run without a step has nothing to save."""
    assert run(Steps(3, error_after=2), epochs=1)[1] == [(0, 2), "error"]
    assert run(Steps(3, error_after=0), epochs=1)[1] == ["error"]


def test_a_run_whose_epochs_are_done_has_nothing_left(run, capsys):
    """Also where the number of its steps is not known."""
    state, _ = run(Steps(2), epochs=1)
    assert run(Steps(2), state=state, epochs=1)[1] == []
    assert "step 2 is done: there is nothing left to train" in capsys.readouterr().err
