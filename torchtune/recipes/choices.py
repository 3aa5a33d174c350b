"""What the params leave open, decided from the model and the data. Reasons and sources: docs/defaults.md."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchtune.checkpoint.open import Checkpoint
from torchtune.data.loader import DataLoader
from torchtune.data.mix import MixReport
from torchtune.data.report import Report
from torchtune.models.config import context_length
from torchtune.recipes.params import FinetuneParams
from torchtune.training.optimizers import ParamGroup
from torchtune.training.precision import get_dtype

# Peak rate of AdamW for full fine-tuning, by number of parameters: the smaller the model, the higher.
FULL_FINETUNE_LR = ((400e6, 1e-4), (2e9, 5e-5), (15e9, 2e-5), (math.inf, 1e-5))

LORA_LR_RATIO = 10.0

MIN_STEP_TOKENS, MAX_STEP_TOKENS = 512, 32_768
STEPS_PER_EPOCH = 32
MAX_PACK_TOKENS = 2048
DEFAULT_EPOCHS = 3
DEFAULT_CONTEXT = 8192


@dataclass(frozen=True)
class Batching:
    """How rows become steps.

    Attributes:
        max_seq_len: tokens of a row at most.
        batch_size: rows per rank and micro-batch.
        gradient_accumulation_steps: micro-batches per optimizer step.
    """

    max_seq_len: int
    batch_size: int
    gradient_accumulation_steps: int

    def as_dict(self) -> dict[str, int]:
        """The values by the params' names."""
        return asdict(self)


def longest_allowed(params: FinetuneParams, config: Mapping[str, Any]) -> int:
    """The longest row in tokens: what the params say, else the model's context up to 8,192."""
    return params.max_seq_len or min(context_length(config) or DEFAULT_CONTEXT, DEFAULT_CONTEXT)


def choose_batching(params: FinetuneParams, report: Report | MixReport, *, limit: int, world_size: int) -> Batching:
    """Fill in what the params leave open, by tokens.

    A step aims at 1/32 of an epoch, within 512 to 32,768 tokens: small data still gives enough steps to
    learn from, large data steps that are worth their cost.

    Args:
        report: what the data's check counted.
        limit: the longest row allowed, in tokens.
    """
    longest, num_samples, num_tokens = report.longest, report.estimated_samples, report.estimated_tokens
    wanted = min(max(num_tokens // STEPS_PER_EPOCH, MIN_STEP_TOKENS), MAX_STEP_TOKENS)
    if params.max_seq_len:
        max_seq_len = params.max_seq_len
    elif params.packed:
        # A pack holds the longest sample, and else no more than a step wants.
        max_seq_len = min(_round_up(max(longest, min(wanted, MAX_PACK_TOKENS)), 64), limit)
    else:
        # Rows that were not checked may be longer than those that were.
        max_seq_len = longest if report.num_checked_rows == report.num_rows else limit
    row_tokens = max_seq_len if params.packed else max(num_tokens // max(num_samples, 1), 1)
    if params.optimizer_in_bwd:  # a step is one micro-batch, as large as it needs
        return Batching(max_seq_len, params.batch_size or max(round(wanted / (row_tokens * world_size)), 1), 1)
    batch_size = params.batch_size or (1 if params.packed else 8)
    accumulation = params.gradient_accumulation_steps or max(round(wanted / (batch_size * row_tokens * world_size)), 1)
    return Batching(max_seq_len, batch_size, accumulation)


def choose_lr(num_parameters: int) -> float:
    """The peak learning rate of a full fine-tune by AdamW, for a model of so many parameters."""
    return next(lr for limit, lr in FULL_FINETUNE_LR if num_parameters <= limit)


def choose_lora_lr(num_parameters: int) -> float:
    """The peak learning rate of a LoRA fine-tune by AdamW: ten times a full one's."""
    return LORA_LR_RATIO * choose_lr(num_parameters)


def head_cost(checkpoint: Checkpoint) -> float:
    """What the head adds for a token that is trained, where a token's way through the layers takes 1.

    By the sizes of their matrices; of a mixture of experts all experts count, though a token meets few of them.
    """
    vocab_size = checkpoint.config.get("vocab_size")
    shapes = [header.shape for header in checkpoint.tensors.values()]
    of_vocabulary = [math.prod(shape) for shape in shapes if len(shape) == 2 and shape[0] == vocab_size]
    return max(of_vocabulary, default=0) / max(checkpoint.num_parameters - sum(of_vocabulary), 1)


def choose_warmup(num_warmup_steps: int | None, total_steps: int | None) -> int:
    """Warm-up steps: as given, else 3 % of all steps, at least one and at most 100."""
    if num_warmup_steps is not None:
        return num_warmup_steps
    return 100 if total_steps is None else min(max(round(0.03 * total_steps), 1), 100)


def choose_epochs(params: FinetuneParams) -> int | None:
    """Passes over the data; None where only `max_steps` ends the run."""
    return params.epochs or (None if params.max_steps else DEFAULT_EPOCHS)


def count_steps(params: FinetuneParams, loader: DataLoader) -> int | None:
    """Optimizer steps of the whole run; None where only the data's end will tell."""
    epochs = choose_epochs(params)
    if epochs is None:
        return params.max_steps
    total = 0
    for epoch in range(epochs):
        steps = loader.num_steps_per_epoch(epoch)
        if steps is None:
            return params.max_steps
        total += min(steps, params.max_steps_per_epoch or steps)
    return min(total, params.max_steps or total)


def progress(step: int, total_steps: int | None, loader: DataLoader, params: FinetuneParams) -> float:
    """How far the run is once `step` is made: in steps where their number is known, else in rows."""
    if total_steps:
        return step / total_steps
    total_epochs = choose_epochs(params)
    assert total_epochs is not None, "a run is counted in steps or in epochs"
    rows_done = loader.sampler.epoch * loader.num_rows + loader.rows_consumed
    return rows_done / (loader.num_rows * total_epochs)


def optimizer_options(params: FinetuneParams, default_lr: float) -> dict[str, Any]:
    """The optimizer's component with what is left open filled in: AdamW's rate, decay and fused kernel."""
    options = dict(params.optimizer)
    if options["_component_"] in ("torch.optim.AdamW", "torch.optim.adamw.AdamW"):
        options = {"lr": default_lr, "weight_decay": 0.0, "fused": True} | options
    return options


def param_groups(params: FinetuneParams) -> list[ParamGroup]:
    """The rates and decays by name pattern."""
    values = [(group.pattern, {"lr": group.lr, "weight_decay": group.weight_decay}) for group in params.param_groups]
    return [ParamGroup(pattern, {k: v for k, v in given.items() if v is not None}) for pattern, given in values]


def fsdp_options(params: FinetuneParams) -> dict[str, Any]:
    """The keywords of `apply_fsdp` that the params decide."""
    return {
        "reduce_dtype": get_dtype(params.fsdp_reduce_dtype),
        "reshard_after_forward": params.fsdp_reshard_after_forward,
        "num_prefetched": params.fsdp_prefetch,
        "cpu_offload": params.fsdp_cpu_offload,
    }


def profiler_options(params: FinetuneParams, output_dir: Path) -> dict[str, Any]:
    """The profiler's keywords."""
    options = asdict(params.profiler)
    return options | {"output_dir": Path(params.profiler.output_dir or output_dir / "profiling_outputs")}


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
