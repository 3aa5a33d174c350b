"""Full fine-tuning: train every weight of a model on your data, and write it as the checkpoint it came from.

    tune run full_finetune model_checkpoint=SmolLM2-135M-Instruct dataset=chats.jsonl

Any number of devices: put `--nproc_per_node N` before the recipe's name. `tune run full_finetune --help`
lists every key; docs/defaults.md says why each default is what it is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic.dataclasses import dataclass

from torchtune.checkpoint.open import Checkpoint, open_checkpoint
from torchtune.checkpoint.training_state import load_optimizer_tensors, load_training_state
from torchtune.config.component import instantiate
from torchtune.config.parse import parse_params
from torchtune.config.strict import STRICT
from torchtune.data.loader import DataLoader
from torchtune.data.sampler import RowSampler
from torchtune.distributed.process_group import any_rank, process_group, rank, sum_over_ranks, world_size
from torchtune.errors import DataError, StoppedBySignal
from torchtune.evaluation.held_out import held_out_loss
from torchtune.models.build import build_model
from torchtune.modules.decoder import CausalLM
from torchtune.recipes import choices
from torchtune.recipes.checks import check
from torchtune.recipes.params import FinetuneParams
from torchtune.recipes.run_folder import RunFolder
from torchtune.tokenizers.tokenizer import Tokenizer
from torchtune.training.activation_checkpointing import apply_activation_checkpointing
from torchtune.training.compiling import apply_compile
from torchtune.training.device import get_device
from torchtune.training.early_stopping import BestLoss
from torchtune.training.gradients import FiniteGuard, clip_grad_norm
from torchtune.training.lr_schedulers import LRSchedule
from torchtune.training.metric_logging import build_metric_loggers
from torchtune.training.optimizers import build_optimizer, freeze
from torchtune.training.precision import autocast, dtype_name, get_dtype
from torchtune.training.profiler import setup_torch_profiler
from torchtune.training.progress import Progress
from torchtune.training.seed import draw_seed, seed_everything
from torchtune.training.signals import StopSignals
from torchtune.training.throughput import StepTimer, peak_memory_bytes

RECIPE = "full_finetune"


@dataclass(config=STRICT, kw_only=True)
class FullFinetuneParams(FinetuneParams):
    """All keys of this recipe."""


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
        self.epochs_run = 0
        self.total_epochs = choices.choose_epochs(params) or sys.maxsize
        self.max_steps_per_epoch = params.max_steps_per_epoch
        self.steps_in_epoch = 0
        self.total_training_steps = 0
        self.best = BestLoss()
        self._open = ExitStack()  # what setup opens; closed by cleanup, or when setup or train raises

    # ------------------------------------------------------------------------------------------------
    # Setup: what is cheap to refuse comes first; weights are read when everything else has been proven.

    def setup(self, params: FullFinetuneParams) -> None:
        """Open the checkpoint, prove the data, build and load the model, and all that training needs."""
        with self._closing_on_error():
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
            ckpt_path: the model to start from. When resuming, the run's own checkpoint is read instead.
        Returns:
            `checkpoint`, an open checkpoint, and `state`, the training state when resuming, else None.
        """
        if self._output.resume_from is not None:
            folder = self._output.resume_from
            return {"checkpoint": open_checkpoint(folder), "state": load_training_state(folder)}
        return {"checkpoint": open_checkpoint(ckpt_path), "state": None}

    def _update_recipe_state(self, ckpt_dict: dict[str, Any]) -> None:
        """Take the run's state from its checkpoint; say which changed keys change what comes out."""
        state = ckpt_dict["state"].state
        warn_of_changes(before=state["params"], now=comparable(self._params))
        self.seed = state["seed"]
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
        data = prepare_finetune_data(params, self._checkpoint, self._tokenizer, max_seq_len=limit, seed=self.seed)
        report = data.train.report
        batching = choices.choose_batching(params, report, limit=limit, world_size=world_size())
        say(f"{report}\n{batching}")
        sampler = RowSampler(data.train.num_rows, seed=self.seed, shuffle=params.shuffle)
        loader = partial(
            DataLoader,
            **batching.as_dict(),
            packed=params.packed,
            seed=self.seed,
            rank=rank(),
            world_size=world_size(),
            num_workers=params.num_workers,
        )
        dataloader = self._open.enter_context(loader(data.train, sampler))
        self._eval_dataloader = None
        if data.held_out is not None:
            in_order = RowSampler(data.held_out.num_rows, seed=self.seed, shuffle=False)
            self._eval_dataloader = self._open.enter_context(loader(data.held_out, in_order))
        self._batching = batching
        return sampler, dataloader

    def _setup_model(self, params: FullFinetuneParams, ckpt_dict: dict[str, Any]) -> CausalLM:
        """Build on the meta device, transform, and only then read weights."""
        with torch.device("meta"):
            model = build_model(self._checkpoint.config)
        freeze(model, params.freeze)
        if params.enable_activation_checkpointing:
            apply_activation_checkpointing(model.model.layers)
        if params.compile:
            apply_compile(model.model.layers)
        self._checkpoint.load_into(model, device=self._device, param_dtype=self._param_dtype)
        if self._resume_from_checkpoint:
            load_masters(model, ckpt_dict["state"])
        return model.train()
