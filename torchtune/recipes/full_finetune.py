"""Full fine-tuning: train every weight of a model on your data, and write it as the checkpoint it came from.

    tune run full_finetune model_checkpoint=SmolLM2-135M-Instruct dataset=chats.jsonl

Any number of devices: put `--nproc_per_node N` before the recipe's name. `tune run full_finetune --help`
lists every key; docs/defaults.md says why each default is what it is.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from torchtune.checkpoint.held import Held
from torchtune.checkpoint.open import Checkpoint, open_checkpoint
from torchtune.checkpoint.save import masters, save_model
from torchtune.checkpoint.training_state import load_masters
from torchtune.config.component import instantiate
from torchtune.config.parse import parse_params
from torchtune.config.strict import STRICT
from torchtune.data.loader import DataLoader
from torchtune.data.sampler import RowSampler
from torchtune.distributed.mesh import Mesh, open_mesh
from torchtune.distributed.process_group import process_group
from torchtune.evaluation.held_out import held_out_loss
from torchtune.models.build import build_model
from torchtune.modules.decoder import CausalLM
from torchtune.parallel.context_parallel import shard_context
from torchtune.parallel.expert_parallel import apply_expert_parallel
from torchtune.parallel.fsdp import apply_fsdp, defer_sums
from torchtune.parallel.tensor_parallel import apply_tensor_parallel
from torchtune.quantization.qat import apply_qat
from torchtune.recipes.base_checkpoint import open_base_checkpoint
from torchtune.recipes.checks import check_finetune
from torchtune.recipes.choices import choose_lr, fsdp_options
from torchtune.recipes.closing import closing_on_error
from torchtune.recipes.finetune_data import open_loaders
from torchtune.recipes.optimization import Optimization
from torchtune.recipes.qat_params import (
    QATParams,
    check_qat,
    gathered_dtype,
    qat_scheme,
    save_quantized,
    tell_plain_rounding,
)
from torchtune.recipes.run_checkpoint import Saves, verified_training_state, write_checkpoint
from torchtune.recipes.run_folder import RunFolder, warn_of_changes
from torchtune.recipes.run_state import RunState
from torchtune.recipes.samples import open_samples
from torchtune.recipes.tasks import open_evaluation
from torchtune.recipes.upkeep import Upkeep
from torchtune.tokenizers.tokenizer import Tokenizer
from torchtune.training.activation_checkpointing import apply_activation_checkpointing
from torchtune.training.allocator import keep_freed_memory
from torchtune.training.compiling import apply_compile
from torchtune.training.device import get_device
from torchtune.training.optimizers import freeze
from torchtune.training.precision import autocast, dtype_name, get_dtype
from torchtune.training.seed import seed_everything
from torchtune.training.throughput import count_tokens

RECIPE = "full_finetune"


@dataclass(config=STRICT, kw_only=True)
class FullFinetuneParams(QATParams):
    """All keys of this recipe."""


def check(params: FullFinetuneParams) -> None:
    """Compare the params with what lies on disk; `tune validate` and `main` call it before anything is loaded."""
    check_finetune(params, RECIPE, adapt=partial(check_qat, params))


class FullFinetuneRecipe:
    """Trains a whole model. The order of a run: `__init__`, `setup`, `train`, `cleanup`."""

    # The run's state under the founding text's names.
    epochs_run = property(attrgetter("state.epochs_run"))
    total_epochs = property(attrgetter("state.total_epochs"))
    total_training_steps = property(attrgetter("state.total_training_steps"))

    def __init__(self, params: FullFinetuneParams) -> None:
        """Take in what the run is; the output folder's state is read, nothing is written."""
        self._params = params
        self._device = get_device(params.device)
        self._dtype = get_dtype(params.dtype, self._device)
        self._param_dtype = get_dtype(params.param_dtype)
        self._output = RunFolder(params, RECIPE)
        self._resume_from_checkpoint = self._output.resume_from is not None
        self._log_every_n_steps = params.log_every_n_steps
        self.state = RunState.of(params)  # what a checkpoint keeps and _update_recipe_state restores
        self._open = ExitStack()  # what setup opens; closed by cleanup, or when setup or train raises

    # Setup: what is cheap to refuse comes first; weights are read once everything else is proven.

    def setup(self, params: FullFinetuneParams) -> None:
        """Open the checkpoint, prove the data, build and load the model and all that training needs."""
        with closing_on_error(self.cleanup):
            self._open.enter_context(keep_freed_memory(self._device))
            self._mesh: Mesh = self._open.enter_context(open_mesh(params.mesh_sizes, self._device))
            ckpt_dict = self.load_checkpoint(ckpt_path=params.model_checkpoint)
            if self._resume_from_checkpoint:
                self._update_recipe_state(ckpt_dict)
            self._checkpoint: Checkpoint = ckpt_dict["checkpoint"]
            self._tokenizer = self._setup_tokenizer(params)
            self._sampler, self._dataloader = self._setup_data(params, ckpt_dict)
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
            return {"checkpoint": open_base_checkpoint(ckpt_path, self._params), "training_state": None}
        training_state = verified_training_state(folder)
        return {"checkpoint": open_checkpoint(folder), "training_state": training_state}

    def _update_recipe_state(self, ckpt_dict: dict[str, Any]) -> None:
        """Take the run's state from its checkpoint; say which changed keys change what comes out."""
        saved = ckpt_dict["training_state"].state
        warn_of_changes(before=saved["params"], params=self._params)
        self.state.load_state_dict(saved)
        if self._params.dtype == "auto":  # the same bits need the same dtype, whatever this machine would choose
            self._dtype = get_dtype(saved["dtype"])

    def _setup_tokenizer(self, params: FullFinetuneParams) -> Tokenizer:
        return self._checkpoint.tokenizer()

    def _setup_data(self, params: FullFinetuneParams, ckpt_dict: dict[str, Any]) -> tuple[RowSampler, DataLoader]:
        """Read, render and prove the data, and decide how it is dealt to steps."""
        loaders = open_loaders(
            params,
            self._checkpoint,
            self._tokenizer,
            self.state,
            ckpt_dict["training_state"],
            mesh=self._mesh,
            until=self._open,
        )
        self._batching, self._eval_dataloader = loaders.batching, loaders.held_out
        return loaders.sampler, loaders.train

    def _setup_model(self, params: FullFinetuneParams, ckpt_dict: dict[str, Any]) -> CausalLM:
        """Build on the meta device, transform, and only then read weights."""
        with torch.device("meta"):
            model = build_model(self._checkpoint.config)
        self._checkpoint.check(model, self._tokenizer)
        if params.freeze:
            freeze(model, params.freeze)
        if scheme := qat_scheme(params):
            apply_qat(model, scheme)
        apply_tensor_parallel(model, self._mesh.tensor)
        apply_expert_parallel(model, self._mesh.expert)
        if params.compile:
            apply_compile(model.model.layers)
        if params.enable_activation_checkpointing:
            apply_activation_checkpointing(
                model.model.layers,
                mode=params.ac_mode,
                option=params.ac_option,
                offload=params.enable_activation_offloading,
            )
        gathered = gathered_dtype(params, self._dtype)
        apply_fsdp(model, self._mesh, dtype=gathered, **fsdp_options(params))  # last: it shards what the others made
        self._checkpoint.load_into(model, device=self._device, param_dtype=self._param_dtype)
        if self._resume_from_checkpoint:
            # The model's files may be narrower than what is trained.
            load_masters(model, ckpt_dict["training_state"].tensors.get("model", {}))
        return model.train()

    def _setup_optimizer(self, params: FullFinetuneParams, ckpt_dict: dict[str, Any]) -> torch.optim.Optimizer:
        """The optimizer, its schedule and the loss scale of fp16, with their state when resuming."""
        self._optimization = Optimization(
            self._model,
            params,
            self._dataloader,
            mesh=self._mesh,
            device=self._device,
            dtype=self._dtype,
            default_lr=choose_lr(self._checkpoint.num_parameters),
        )
        if self._resume_from_checkpoint:
            self._optimization.load_state_dict(ckpt_dict["training_state"])
        return self._optimization.optimizer

    def _setup_loss(self, params: FullFinetuneParams) -> Any:
        return instantiate(params.loss)

    def _setup_observers(self, params: FullFinetuneParams) -> None:
        """Loggers, profiler and what else goes on between steps; from here on the run writes."""
        decided = {"seed": self.state.seed, "dtype": dtype_name(self._dtype), **self._batching.as_dict()}
        self._output.write_config(params, decided | self._optimization.decided())
        self.metric_loggers = self._output.open_loggers(params, at_step=self.total_training_steps)
        self._open.callback(self.metric_loggers.close)
        saves = Saves(self._output, in_background=params.enable_async_checkpointing)
        self._saves = self._open.enter_context(saves)
        self._samples = open_samples(params, self._checkpoint, self._tokenizer, self.state, self._output.path)
        self._evaluation = open_evaluation(params, self._checkpoint, self._tokenizer, self.state)
        evaluate = None if self._eval_dataloader is None else self.evaluate
        tell_plain_rounding(params, self.state, self._model, evaluate, self.metric_loggers)
        self._upkeep = Upkeep(
            params,
            self.state,
            self._output,
            self._dataloader,
            self.metric_loggers,
            device=self._device,
            total_steps=self._optimization.total_steps,
            evaluate=evaluate,
            measure=None if self._evaluation is None else self.measure,
            sample=None if self._samples is None else self.sample,
            save=self.save_checkpoint,
            saves=self._saves,
            until=self._open,
        )

    def train(self) -> None:
        """Run what is left of the epochs: forward, backward, step; log, evaluate and save in between.

        Raises:
            TrainingError: the loss or a gradient is not finite.
            StoppedBySignal: SIGTERM or Ctrl-C; the run is saved.
            DataError: a row that was too far back to be checked before; the run is saved.
        """
        if self._upkeep.nothing_is_left():
            return
        with closing_on_error(self.cleanup), self._upkeep.running():
            self._optimizer.zero_grad()
            for curr_epoch in range(self.epochs_run, self.total_epochs):
                for micro_batches in self._upkeep.steps_of_epoch(curr_epoch):
                    step = self.total_training_steps + 1
                    lr = self._optimization.set_lr(step)
                    # Every trained token of the step weighs the same, on whichever rank or micro-batch it
                    # lies; a mean per micro-batch would favour the short ones.
                    num_trained, num_tokens = count_tokens(micro_batches, self._mesh, self._device)
                    losses = []
                    for index, batch in enumerate(micro_batches):
                        seed_everything(self.state.seed, step, self._mesh.place_of(index, len(micro_batches)))
                        batch = shard_context(batch, self._mesh.context, multiple=self._mesh.tensor.size)
                        batch = batch.to(self._device)
                        defer_sums(self._model, self._params.fsdp_sum_once and index + 1 < len(micro_batches))
                        with self._autocast:
                            # The head runs inside the model, over trained positions alone.
                            loss = self._model(
                                batch.input_ids,
                                batch.documents,
                                labels=batch.labels,
                                trained=batch.trained,
                                loss=self._loss_fn,
                            )
                        self._optimization.scaled(loss / num_trained).backward()
                        losses.append(loss.detach())
                    grad_norm = self._optimization.gather_gradients()
                    self._optimization.check_finite(step, losses, grad_norm, micro_batches)
                    self._optimization.clip_gradients(grad_norm)
                    self._optimization.step(self.state.seed, step)
                    loss = self._mesh.tokens.sum(torch.stack(losses).sum()) / num_trained
                    metrics = {"loss": loss, "lr": lr, "grad_norm": grad_norm}
                    metrics |= {"trained_tokens": num_trained, "tokens": num_tokens}
                    if self._upkeep.after_step(curr_epoch, metrics):  # it counts, evaluates, logs and saves
                        return

    def evaluate(self) -> float:
        """The mean loss over all trained tokens of the held-out data."""
        assert self._eval_dataloader is not None, "there is nothing held out"
        self._eval_dataloader.set_epoch(0)
        with self._autocast:
            return held_out_loss(self._model, self._eval_dataloader, self._loss_fn, self._mesh, self._device)

    def measure(self) -> dict[str, float]:
        """The metrics of `evaluation`'s tasks."""
        assert self._evaluation is not None, "there are no tasks"
        with self._autocast:
            return self._evaluation(self._model)

    def sample(self, step: int) -> None:
        """Answer the prompts of `samples`, as the model is after this step."""
        assert self._samples is not None, "there are no prompts"
        with self._autocast:
            self._samples(self._model, step)

    def save_checkpoint(self, epoch: int | None = None) -> Path:
        """Write OUT/step_N/: the model as its source was, and recipe_state/ to resume from.

        Args:
            epoch: the epoch that the step belongs to, for the record.
        Returns:
            The checkpoint's folder; with `qat` the quantised model is in `quantized/` below it.
        Raises:
            CheckpointError: it could not be written; earlier ones are untouched.
        """

        def write_model(folder: Path, held: Held) -> dict[str, Tensor]:
            save_model(folder, self._model, self._checkpoint, held=held)
            save_quantized(self._params, folder, self._model, self._checkpoint, held=held)
            return masters(self._model, self._checkpoint, held)

        return write_checkpoint(
            self._saves,
            self._params,
            self.state,
            self._optimization,
            self._dataloader,
            dtype=self._dtype,
            epoch=epoch,
            write_model=write_model,
        )

    def cleanup(self) -> None:
        """Close what `setup` opened: loggers, workers, profiler."""
        self._open.close()


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
