"""Full fine-tuning: train every weight of a model on your data, and write it as the checkpoint it came from.

    tune run full_finetune model_checkpoint=SmolLM2-135M-Instruct dataset=chats.jsonl

Any number of devices: put `--nproc_per_node N` before the recipe's name. `tune run full_finetune --help`
lists every key; docs/defaults.md says why each default is what it is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic.dataclasses import dataclass

from torchtune.checkpoint.open import Checkpoint, open_checkpoint
from torchtune.checkpoint.save import masters, save_model
from torchtune.checkpoint.steps import mark_best, prune_steps, verify_step, write_step
from torchtune.checkpoint.training_state import (
    load_masters,
    load_optimizer_tensors,
    load_training_state,
    optimizer_tensors,
    save_training_state,
)
from torchtune.config.component import instantiate
from torchtune.config.parse import parse_params
from torchtune.config.strict import STRICT
from torchtune.data.batch import Batch
from torchtune.data.loader import DataLoader
from torchtune.data.sampler import RowSampler
from torchtune.distributed.gradients import sum_gradients
from torchtune.distributed.process_group import (
    any_rank,
    barrier,
    is_main,
    process_group,
    rank,
    sum_over_ranks,
    world_size,
)
from torchtune.errors import DataError, StoppedBySignal
from torchtune.evaluation.held_out import held_out_loss
from torchtune.models.build import build_model
from torchtune.modules.decoder import CausalLM
from torchtune.recipes import choices
from torchtune.recipes.base_checkpoint import open_base_checkpoint
from torchtune.recipes.checks import check_finetune
from torchtune.recipes.finetune_data import deal, prepare_data
from torchtune.recipes.params import FinetuneParams
from torchtune.recipes.run_folder import RunFolder, comparable, save_is_due, warn_of_changes
from torchtune.tokenizers.tokenizer import Tokenizer
from torchtune.training.activation_checkpointing import apply_activation_checkpointing
from torchtune.training.allocator import keep_freed_memory
from torchtune.training.compiling import apply_compile
from torchtune.training.device import get_device
from torchtune.training.early_stopping import BestLoss
from torchtune.training.gradients import FiniteGuard, clip_gradients, gradient_norm
from torchtune.training.lr_schedulers import LRSchedule
from torchtune.training.optimizers import build_optimizer, freeze
from torchtune.training.precision import autocast, dtype_name, get_dtype
from torchtune.training.profiler import setup_torch_profiler
from torchtune.training.progress import Progress, say
from torchtune.training.seed import draw_seed, seed_everything
from torchtune.training.signals import StopSignals
from torchtune.training.throughput import StepTimer, peak_memory_bytes

RECIPE = "full_finetune"


@dataclass(config=STRICT, kw_only=True)
class FullFinetuneParams(FinetuneParams):
    """All keys of this recipe."""


def check(params: FullFinetuneParams) -> None:
    """Compare the params with what lies on disk; `tune validate` and `main` call it before anything is loaded."""
    check_finetune(params, RECIPE)


class FullFinetuneRecipe:
    """Trains a whole model. The order of a run: `__init__`, `setup`, `train`, `cleanup`."""

    def __init__(self, params: FullFinetuneParams) -> None:
        """Take in what the run is; the output folder's state is read, nothing is written."""
        self._params = params
        self._device = get_device(params.device)
        self._dtype = get_dtype(params.dtype, self._device)
        self._param_dtype = get_dtype(params.param_dtype)
        self._output = RunFolder(params, RECIPE)
        self._resume_from_checkpoint = self._output.resume_from is not None
        self._log_every_n_steps = params.log_every_n_steps
        # The recipe's state: what a checkpoint keeps and _update_recipe_state restores.
        self.seed = draw_seed(params.seed)
        self.started = datetime.now()  # the time that chat templates are told
        self.epochs_run = 0
        self.total_epochs = choices.choose_epochs(params) or sys.maxsize
        self.max_steps_per_epoch = params.max_steps_per_epoch
        self.steps_in_epoch = 0
        self.total_training_steps = 0
        self.best = BestLoss()
        self._open = ExitStack()  # what setup opens; closed by cleanup, or when setup or train raises

    # Setup: what is cheap to refuse comes first; weights are read once everything else is proven.

    def setup(self, params: FullFinetuneParams) -> None:
        """Open the checkpoint, prove the data, build and load the model and all that training needs."""
        with self._closing_on_error():
            self._open.enter_context(keep_freed_memory(self._device))
            ckpt_dict = self.load_checkpoint(ckpt_path=params.model_checkpoint)
            if self._resume_from_checkpoint:
                self._update_recipe_state(ckpt_dict)
            self._checkpoint: Checkpoint = ckpt_dict["checkpoint"]
            self._tokenizer = self._setup_tokenizer(params)
            self._sampler, self._dataloader = self._setup_data(params)
            self._model = self._setup_model(params, ckpt_dict)
            self._autocast = autocast(self._model, self._dtype)
            self._optimizer = self._setup_optimizer(params, ckpt_dict)
            self._loss_fn = self._setup_loss(params)
            self._setup_observers(params)

    def load_checkpoint(self, ckpt_path: str | Path) -> dict[str, Any]:
        """What the run starts from; no weight is read.

        Args:
            ckpt_path: the model to start from. When resuming, the run's own checkpoint is opened instead.
        Returns:
            `checkpoint`, an open checkpoint, and `training_state` when resuming, else None.
        """
        folder = self._output.resume_from
        if folder is None:
            checkpoint = open_base_checkpoint(ckpt_path, self._params)
            return {"checkpoint": checkpoint, "training_state": None}
        if is_main():  # one rank reads it whole; the others end when it does
            verify_step(folder)
        barrier()
        return {"checkpoint": open_checkpoint(folder), "training_state": load_training_state(folder)}

    def _update_recipe_state(self, ckpt_dict: dict[str, Any]) -> None:
        """Take the run's state from its checkpoint; say which changed keys change what comes out."""
        state = ckpt_dict["training_state"].state
        warn_of_changes(before=state["params"], params=self._params)
        self.seed = state["seed"]
        self.started = datetime.fromisoformat(state["started"])
        self.epochs_run = state["epochs_run"]
        self.steps_in_epoch = state["steps_in_epoch"]
        self.total_training_steps = state["total_training_steps"]
        self.best = BestLoss.from_state_dict(state["best"])
        if self._params.dtype == "auto":  # the same bits need the same dtype, whatever this machine would choose
            self._dtype = get_dtype(state["dtype"])

    def _setup_tokenizer(self, params: FullFinetuneParams) -> Tokenizer:
        return self._checkpoint.tokenizer()

    def _setup_data(self, params: FullFinetuneParams) -> tuple[RowSampler, DataLoader]:
        """Read, render and prove the data, and decide how it is dealt to steps."""
        limit = choices.longest_allowed(params, self._checkpoint.config)
        data = prepare_data(
            params, self._checkpoint, self._tokenizer, max_seq_len=limit, seed=self.seed, now=self.started
        )
        say(str(data.train.report))
        self._batching = choices.choose_batching(params, data.train.report, limit=limit, world_size=world_size())
        sampler, dataloader, self._eval_dataloader = deal(
            data, params, self._batching, seed=self.seed, until=self._open
        )
        return sampler, dataloader

    def _setup_model(self, params: FullFinetuneParams, ckpt_dict: dict[str, Any]) -> CausalLM:
        """Build on the meta device, transform, and only then read weights."""
        with torch.device("meta"):
            model = build_model(self._checkpoint.config)
        self._checkpoint.check(model, self._tokenizer)
        if params.freeze:
            freeze(model, params.freeze)
        if params.enable_activation_checkpointing:
            apply_activation_checkpointing(model.model.layers)
        if params.compile:
            apply_compile(model.model.layers)
        self._checkpoint.load_into(model, device=self._device, param_dtype=self._param_dtype)
        if self._resume_from_checkpoint:
            # The model's files may be narrower than what is trained.
            load_masters(model, ckpt_dict["training_state"].tensors.get("model", {}))
        return model.train()

    def _setup_optimizer(self, params: FullFinetuneParams, ckpt_dict: dict[str, Any]) -> torch.optim.Optimizer:
        """The optimizer, its schedule and the loss scale of fp16, with their state when resuming."""
        options = choices.optimizer_options(params, self._checkpoint.num_parameters)
        optimizer = build_optimizer(
            self._model,
            partial(instantiate, options),
            choices.param_groups(params),
            weight_decay=options.get("weight_decay"),
        )
        self._total_steps = choices.count_steps(params, self._dataloader)
        self._lr_schedule = LRSchedule(
            optimizer,
            name=params.lr_scheduler.name,
            num_warmup_steps=choices.choose_warmup(params.lr_scheduler.num_warmup_steps, self._total_steps),
            min_lr_ratio=params.lr_scheduler.min_lr_ratio,
        )
        self._grad_scaler = torch.amp.GradScaler(self._device.type, enabled=self._dtype == torch.float16)
        if self._resume_from_checkpoint:
            saved = ckpt_dict["training_state"]
            names = {parameter: name for name, parameter in self._model.named_parameters()}
            load_optimizer_tensors(optimizer, names, saved.tensors.get("optimizer", {}), saved.state["optimizer"])
            self._lr_schedule.warmup_progress = saved.state["warmup_progress"]
            self._grad_scaler.load_state_dict(saved.state["grad_scaler"])
            if self.steps_in_epoch:
                self._dataloader.load_state_dict(saved.state["dataloader"])
        return optimizer

    def _setup_loss(self, params: FullFinetuneParams) -> Any:
        return instantiate(params.loss)

    def _setup_observers(self, params: FullFinetuneParams) -> None:
        """Loggers, profiler and the guard against losses that are not finite; from here on the run writes."""
        decided = {"seed": self.seed, "dtype": dtype_name(self._dtype), **self._batching.as_dict()}
        decided |= {"lr": self._optimizer.param_groups[0]["initial_lr"], "steps": self._total_steps}
        decided |= {"num_warmup_steps": self._lr_schedule.num_warmup_steps}
        say(f"{self._output.path}: " + ", ".join(f"{name} {value}" for name, value in decided.items()))
        self._output.write_config(params, decided)
        self.metric_loggers = self._output.open_loggers(params, at_step=self.total_training_steps)
        self._open.callback(self.metric_loggers.close)
        profiling = choices.profiler_options(params, self._output.path)
        self._profiler = self._open.enter_context(setup_torch_profiler(**profiling))
        # fp16's loss scale makes gradients overflow on purpose; such a step is skipped, not wrong.
        self._guard = FiniteGuard(checks_gradients=not self._grad_scaler.is_enabled())
        self._timer = StepTimer()

    def train(self) -> None:
        """Run what is left of the epochs: forward, backward, step; log, evaluate and save in between.

        Raises:
            TrainingError: the loss or a gradient is not finite.
            StoppedBySignal: SIGTERM or Ctrl-C; the run is saved.
            DataError: a row that was too far back to be checked before; the run is saved.
        """
        if self._total_steps is not None and self.total_training_steps >= self._total_steps:
            say(f"step {self.total_training_steps} of {self._total_steps} is done: there is nothing left to train")
            return
        with (
            self._closing_on_error(),
            StopSignals() as self._signals,
            Progress(self._total_steps, start_step=self.total_training_steps) as self._progress,
        ):
            self._optimizer.zero_grad()
            self._timer.reset()
            for curr_epoch in range(self.epochs_run, self.total_epochs):
                self._dataloader.set_epoch(curr_epoch)  # and the sampler's
                for micro_batches in self._steps_of_epoch(curr_epoch):
                    step = self.total_training_steps + 1
                    lr = self._lr_schedule.set_lr(
                        step, choices.progress(step, self._total_steps, self._dataloader, self.total_epochs)
                    )
                    # Every trained token of the step weighs the same, on whichever rank or micro-batch it
                    # lies; a mean per micro-batch would favour the short ones.
                    counts = [[batch.num_trained, batch.num_tokens] for batch in micro_batches]
                    num_trained, num_tokens = sum_over_ranks(torch.tensor(counts, device=self._device).sum(0)).unbind()
                    losses = []
                    for index, batch in enumerate(micro_batches):
                        seed_everything(self.seed, step, rank() * len(micro_batches) + index)
                        batch = batch.to(self._device)
                        with self._autocast:
                            # The head runs inside the model, over trained positions alone.
                            loss = self._model(
                                batch.input_ids,
                                batch.documents,
                                labels=batch.labels,
                                trained=batch.trained,
                                loss=self._loss_fn,
                            )
                        self._grad_scaler.scale(loss / num_trained).backward()
                        losses.append(loss.detach())
                    sum_gradients(self._model.parameters())
                    self._grad_scaler.unscale_(self._optimizer)
                    grad_norm = gradient_norm(self._model.parameters())
                    self._guard.add(step, losses, grad_norm, [batch.sources for batch in micro_batches])
                    if self._device.type == "cpu" or step % self._log_every_n_steps == 0:
                        self._guard.check(self._model)  # elsewhere the host would wait for the device
                    clip_gradients(self._model.parameters(), self._params.clip_grad_norm, grad_norm)
                    self._grad_scaler.step(self._optimizer)
                    self._grad_scaler.update()
                    self._optimizer.zero_grad()

                    self.total_training_steps += 1
                    self.steps_in_epoch += 1
                    self._timer.add_step(num_tokens)
                    self._profiler.step()
                    loss = sum_over_ranks(torch.stack(losses).sum()) / num_trained
                    metrics = {"epoch": curr_epoch + 1, "loss": loss, "lr": lr, "grad_norm": grad_norm}
                    metrics |= {"trained_tokens": num_trained, "tokens": num_tokens}
                    if self._after_step(curr_epoch, metrics):
                        return
            if not self._output.has_saved(self.total_training_steps) and self._params.save_last:
                self.save_checkpoint(epoch=self.epochs_run - 1)  # the data ended in rows that are not trained on

    def _steps_of_epoch(self, epoch: int) -> Iterator[list[Batch]]:
        """The epoch's steps, until `_after_step` declares it done. A row that can't be trained on ends the run, saved."""
        try:
            for micro_batches in self._dataloader:
                yield micro_batches
                if self.epochs_run > epoch:
                    break
        except DataError:
            if self.total_training_steps:
                self.save_checkpoint(epoch=epoch)
            raise
        self.epochs_run, self.steps_in_epoch = epoch + 1, 0

    def _after_step(self, epoch: int, metrics: dict[str, Any]) -> bool:
        """Evaluate, log and save where that is due. Returns whether the run is over.

        Raises:
            StoppedBySignal: the run was asked to stop; it is saved.
        """
        params, step = self._params, self.total_training_steps
        read_all = self._dataloader.rows_consumed >= self._dataloader.num_rows
        epoch_ends = read_all or self.steps_in_epoch == self.max_steps_per_epoch
        run_ends = step == params.max_steps or (epoch_ends and epoch + 1 == self.total_epochs)
        every, stopping, is_best = params.eval_every_n_steps, params.early_stopping, False
        evaluates = self._eval_dataloader is not None and (run_ends or (step % every == 0 if every else epoch_ends))
        if run_ends or evaluates or step % self._log_every_n_steps == 0:
            # The step's only wait for the device.
            metrics = {name: value.item() if torch.is_tensor(value) else value for name, value in metrics.items()}
            metrics |= self._timer.metrics() | {"peak_memory_bytes": peak_memory_bytes(self._device)}
            with self._timer.paused():
                if evaluates:
                    metrics["eval_loss"] = self.evaluate()
                    is_best = self.best.update(
                        metrics["eval_loss"], step, min_delta=stopping.min_delta if stopping else 0
                    )
                self.metric_loggers.log_dict(metrics, step)
                self._progress.update(step, metrics)
                run_ends |= stopping is not None and self.best.num_without_better >= stopping.patience
        if epoch_ends:
            self.epochs_run, self.steps_in_epoch = epoch + 1, 0
        with self._timer.paused():
            # Clocks and signals differ between ranks, so they agree.
            stop = any_rank(self._signals.stop_requested is not None, self._device)
            asked = self._signals.take_save_request() or self._output.save_is_overdue(params.save_every_minutes)
            due = save_is_due(params, step, epoch_ends=epoch_ends, run_ends=run_ends) or any_rank(asked, self._device)
            if stop or is_best or due:
                folder = self.save_checkpoint(epoch=epoch)
                if is_best and is_main():
                    mark_best(self._output.path, step)
        if stop:
            raise StoppedBySignal(
                self._signals.stop_requested or 0,
                f"stopped after step {step}, saved in {folder}; resume_from_checkpoint=true goes on from there",
            )
        return run_ends

    def evaluate(self) -> float:
        """The mean loss over all trained tokens of the held-out data."""
        assert self._eval_dataloader is not None, "there is nothing held out"
        self._eval_dataloader.set_epoch(0)
        with self._autocast:
            return held_out_loss(self._model, self._eval_dataloader, self._loss_fn, self._device)

    def save_checkpoint(self, epoch: int | None = None) -> Path:
        """Write OUT/step_N/: the model as its source was, and recipe_state/ to resume from.

        Args:
            epoch: the epoch that the step belongs to, for the record.
        Returns:
            The checkpoint's folder.
        Raises:
            CheckpointError: it could not be written; earlier ones are untouched.
        """
        self._guard.check(self._model)  # nothing is saved unchecked
        step = self.total_training_steps
        named = dict(self._model.named_parameters())
        tensors, others = optimizer_tensors(self._optimizer, {parameter: name for name, parameter in named.items()})
        state = {
            "params": comparable(self._params),
            "seed": self.seed,
            "started": self.started.isoformat(),
            "dtype": dtype_name(self._dtype),
            "epoch": epoch,
            "epochs_run": self.epochs_run,
            "steps_in_epoch": self.steps_in_epoch,
            "total_training_steps": step,
            "dataloader": self._dataloader.state_dict(),
            "warmup_progress": self._lr_schedule.warmup_progress,
            "grad_scaler": self._grad_scaler.state_dict(),
            "optimizer": others,
            "best": self.best.state_dict(),
        }

        def write(folder: Path) -> None:
            save_model(folder, self._model, self._checkpoint)
            trained = {"model": masters(self._model, self._checkpoint), "optimizer": tensors}
            save_training_state(folder, trained, state)

        if is_main():
            write_step(self._output.path, step, write)
            prune_steps(self._output.path, self._params.keep_last, keep=[self.best.step or step])
        barrier()
        return self._output.saved(step)

    def cleanup(self) -> None:
        """Close what `setup` opened: loggers, workers, profiler."""
        self._open.close()

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.cleanup()
            raise


def main() -> None:
    """The recipe as a program: `tune run full_finetune key=value ...`."""
    params = parse_params(FullFinetuneParams)  # every mistake in them is reported here, before anything is read
    with process_group(params.device):  # one rank is not a special case
        check(params)
        recipe = FullFinetuneRecipe(params=params)
        recipe.setup(params=params)
        recipe.train()
        recipe.cleanup()


if __name__ == "__main__":
    main()
