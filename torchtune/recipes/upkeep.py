"""What a run does between its steps: count, log, evaluate, save, and see whether it is over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from torchtune.checkpoint.steps import mark_best
from torchtune.data.batch import Batch
from torchtune.data.loader import DataLoader
from torchtune.distributed.process_group import any_rank, is_main, max_over_ranks
from torchtune.errors import DataError, StoppedBySignal
from torchtune.recipes import choices
from torchtune.recipes.params import EvaluationParams, FinetuneParams, SamplesParams
from torchtune.recipes.run_checkpoint import Saves
from torchtune.recipes.run_folder import RunFolder, save_is_due
from torchtune.recipes.run_state import RunState
from torchtune.training.metric_logging import MetricLoggers
from torchtune.training.profiler import setup_torch_profiler
from torchtune.training.progress import Progress, say
from torchtune.training.signals import StopSignals
from torchtune.training.throughput import StepTimer, peak_memory_bytes


class Upkeep:
    """Everything around the loop that is no training. The loop stays the recipe's:

        with upkeep.running():
            for epoch in range(state.epochs_run, state.total_epochs):
                for micro_batches in upkeep.steps_of_epoch(epoch):
                    ...
                    if upkeep.after_step(epoch, metrics):
                        return

    Args:
        loader: the steps.
        loggers: what metrics go to.
        total_steps: optimizer steps of the whole run; None where only the data's end will tell.
        evaluate: measures the held-out loss; None where nothing is held out.
        measure: asks tasks, gives their metrics; None where there are none.
        sample: answers prompts after a step; None where there are none.
        save: writes a checkpoint of the step just made, given its epoch; returns the folder.
        saves: what `save` writes by, maybe in the background.
        until: closes the profiler.
    """

    def __init__(
        self,
        params: FinetuneParams,
        state: RunState,
        output: RunFolder,
        loader: DataLoader,
        loggers: MetricLoggers,
        *,
        device: torch.device,
        total_steps: int | None,
        evaluate: Callable[[], float] | None,
        measure: Callable[[], dict[str, float]] | None,
        sample: Callable[[int], None] | None,
        save: Callable[[int], Path],
        saves: Saves,
        until: ExitStack,
    ) -> None:
        self._params = params
        self._state = state
        self._output = output
        self._loader = loader
        self._loggers = loggers
        self._device = device
        self._total_steps = total_steps
        self._evaluate, self._measure, self._sample = evaluate, measure, sample
        self._save = save
        self._saves = saves
        self._profiler = until.enter_context(setup_torch_profiler(**choices.profiler_options(params, output.path)))
        self._timer = StepTimer()
        self._signals = StopSignals()

    def nothing_is_left(self) -> bool:
        """Whether the run is at its end already, as one that is resumed there; says so."""
        state, total = self._state, self._total_steps
        is_over = state.epochs_run >= state.total_epochs or (total is not None and state.total_training_steps >= total)
        if is_over:
            of = f" of {total}" if total else ""
            say(f"step {state.total_training_steps}{of} is done: there is nothing left to train")
        return is_over

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within this context signals are heard, progress is shown and time is taken; at its end all is saved."""
        progress = Progress(self._total_steps, start_step=self._state.total_training_steps)
        with StopSignals() as self._signals, progress as self._progress:
            self._timer.reset()
            yield
            self._saves.wait()

    def steps_of_epoch(self, epoch: int) -> Iterator[list[Batch]]:
        """The epoch's steps that are left, each as its micro-batches.

        Raises:
            DataError: a row that was too far back to be checked before; the run is saved.
        """
        state = self._state
        self._loader.set_epoch(epoch)  # and the sampler's
        try:
            for micro_batches in self._loader:
                yield micro_batches
                if state.epochs_run > epoch:
                    break
        except DataError:
            if state.total_training_steps:
                self._save(epoch)
            raise
        state.end_epoch(epoch)
        run_ends = state.epochs_run >= state.total_epochs
        if run_ends and self._params.save_last and not self._output.has_saved(state.total_training_steps):
            self._save(epoch)  # the data ended in rows that are not trained on

    def after_step(self, epoch: int, metrics: dict[str, Any]) -> bool:
        """Count a step that was made; profile, evaluate, log and save where that is due.

        Args:
            metrics: `loss`, and `tokens` on all ranks; what else is logged. Tensors stay on the device until then.
        Returns:
            Whether the run is over.
        Raises:
            StoppedBySignal: the run was asked to stop; it is saved.
        """
        params, state = self._params, self._state
        state.count_step()
        self._timer.add_step(metrics["tokens"])
        self._profiler.step()
        step = state.total_training_steps
        read_all = self._loader.rows_consumed >= self._loader.num_rows
        epoch_ends = read_all or state.steps_in_epoch == state.max_steps_per_epoch
        run_ends = step == params.max_steps or (epoch_ends and epoch + 1 == state.total_epochs)
        every = params.eval_every_n_steps
        evaluates = self._evaluate is not None and (run_ends or (step % every == 0 if every else epoch_ends))
        measures = _is_due(params.evaluation, step, epoch_ends or run_ends)
        is_best = False
        if run_ends or evaluates or measures or step % params.log_every_n_steps == 0:
            is_best = self._log({"epoch": epoch + 1} | metrics, evaluates=evaluates, measures=measures)
            run_ends |= self._stops_early
        if epoch_ends:
            state.end_epoch(epoch)
        with self._timer.paused():
            if self._sample is not None and _is_due(params.samples, step, epoch_ends or run_ends):
                self._sample(step)
            self._save_if_due(epoch, epoch_ends=epoch_ends, run_ends=run_ends, is_best=is_best)
        return run_ends

    @property
    def _stops_early(self) -> bool:
        stopping = self._params.early_stopping
        return stopping is not None and self._state.best.num_without_better >= stopping.patience

    def _log(self, metrics: dict[str, Any], *, evaluates: bool, measures: bool) -> bool:
        """Log the step, and the held-out loss and tasks' metrics if these are due; whether the loss is the best."""
        step, stopping, is_best = self._state.total_training_steps, self._params.early_stopping, False
        # The step's only wait for the device.
        metrics = {name: value.item() if torch.is_tensor(value) else value for name, value in metrics.items()}
        metrics |= self._timer.metrics() | {"peak_memory_bytes": peak_memory_bytes(self._device)}
        with self._timer.paused():
            if evaluates:
                assert self._evaluate is not None
                metrics["eval_loss"] = loss = self._evaluate()
                is_best = self._state.best.update(loss, step, min_delta=stopping.min_delta if stopping else 0)
            if self._measure is not None and (measures or _is_due(self._params.evaluation, step, self._stops_early)):
                metrics |= self._measure()
            self._loggers.log_dict(metrics, step)
            self._progress.update(step, metrics)
        return is_best

    def _save_if_due(self, epoch: int, *, epoch_ends: bool, run_ends: bool, is_best: bool) -> None:
        params, step = self._params, self._state.total_training_steps
        # Clocks and signals differ between ranks, so they agree.
        stop = max_over_ranks(self._signals.stop_requested or 0, self._device)
        asked = self._signals.take_save_request() or self._output.save_is_overdue(params.save_every_minutes)
        asked |= self._saves.have_failed  # all save then, and all raise
        due = save_is_due(params, step, epoch_ends=epoch_ends, run_ends=run_ends) or any_rank(asked, self._device)
        if not (stop or is_best or due):
            return
        folder = self._save(epoch)
        if is_best or stop:
            self._saves.wait()
        if is_best and is_main():
            mark_best(self._output.path, step)
        if stop:
            raise StoppedBySignal(
                stop,
                f"stopped after step {step}, saved in {folder}; resume_from_checkpoint=true goes on from there",
            )


def _is_due(params: EvaluationParams | SamplesParams | None, step: int, at_an_end: bool) -> bool:
    """Whether it is asked for after this step; where no number of steps is given, at an end."""
    if params is None:
        return False
    return step % params.every_n_steps == 0 if params.every_n_steps else at_an_end
