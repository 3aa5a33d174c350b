"""Quantisation-aware training in a recipe: its keys, and what full_finetune and lora_finetune do by them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from torchtune.checkpoint.held import Held
from torchtune.checkpoint.open import Checkpoint
from torchtune.checkpoint.save import save_model
from torchtune.config.strict import STRICT
from torchtune.errors import ConfigError
from torchtune.modules.decoder import CausalLM
from torchtune.quantization.encoding import encoding_of
from torchtune.quantization.qat import apply_qat, not_rounded
from torchtune.quantization.schemes import Scheme, scheme_of
from torchtune.recipes.params import Count, FinetuneParams
from torchtune.recipes.run_state import RunState
from torchtune.training.metric_logging import MetricLoggers
from torchtune.training.progress import say

# Below a checkpoint's folder: the model as recipe `quantize` would write it.
QUANTIZED = "quantized"


@dataclass(config=STRICT, kw_only=True)
class QATParams(FinetuneParams):
    """The keys of every fine-tune, and those of quantisation-aware training."""

    qat: Literal["none", "int4", "int8"] = Field(
        default="none", description="Train with weights rounded as recipe quantize rounds them, and write both."
    )
    qat_group_size: Count | None = Field(
        default=None, description="Weights that share a scale; by default 64 for int4, a row for int8."
    )

    @model_validator(mode="after")
    def _rounds_alone(self) -> QATParams:
        problems = []
        if self.qat == "none" and self.qat_group_size is not None:
            problems.append("qat_group_size: nothing is rounded; set qat=int4 or int8")
        if self.qat != "none" and self.tensor_parallel > 1:
            problems.append("tensor_parallel: with qat a layer's rows must be whole to be rounded; leave it out")
        if self.qat != "none" and self.compile:
            problems.append("compile: torchao's rounding is not traced; leave it out with qat")
        if problems:
            raise ValueError("\n".join(problems))
        return self


def qat_scheme(params: QATParams) -> Scheme | None:
    """What weights are rounded to, if they are."""
    return None if params.qat == "none" else scheme_of(params.qat, group_size=params.qat_group_size, key="qat")


def check_qat(params: QATParams, checkpoint: Checkpoint, model: CausalLM) -> None:
    """Whether the model's layers can be rounded so; the model on the meta device is changed.

    Raises:
        ConfigError: groups that don't divide a layer's rows.
        UnsupportedError: the model can't be written quantised.
        MissingDependencyError: torchao is not installed.
    """
    scheme = qat_scheme(params)
    if scheme is None:
        return
    scheme.need_library("qat")
    try:
        apply_qat(model, scheme)
    except ConfigError as error:
        raise ConfigError("; ".join(problem.message for problem in error.problems), key="qat_group_size") from error


def gathered_dtype(params: QATParams, dtype: torch.dtype) -> torch.dtype:
    """What FSDP gathers weights in: those that are to be rounded must not have been cast before, as what is written isn't."""
    return dtype if params.qat == "none" else torch.promote_types(dtype, torch.float32)


def tell_plain_rounding(
    params: QATParams,
    state: RunState,
    model: CausalLM,
    evaluate: Callable[[], float] | None,
    loggers: MetricLoggers,
) -> None:
    """Say and log, as step 0, what rounding alone does to the held-out loss: the run's own are to be held against it.

    Args:
        evaluate: measures it on the model as it is; None where nothing is held out.
    """
    if params.qat == "none" or evaluate is None or state.total_training_steps:
        return
    with not_rounded(model):
        before = evaluate()
    rounded = evaluate()
    loggers.log_dict({"eval_loss": rounded, "eval_loss_not_rounded": before}, 0)
    say(f"held-out loss {before:.4f} before training, {rounded:.4f} with weights rounded ({rounded / before - 1:+.2%})")


def save_quantized(
    params: QATParams,
    folder: Path,
    model: CausalLM,
    checkpoint: Checkpoint,
    *,
    held: Held,
    values: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Write FOLDER/quantized/, if weights are rounded; arguments are `save_model`'s."""
    if scheme := qat_scheme(params):
        encoding = encoding_of(model, scheme)
        save_model(folder / QUANTIZED, model, checkpoint, values=values, held=held, encoding=encoding)
