"""The keys of quantisation-aware training: what full_finetune has besides every fine-tune's."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from torchtune.checkpoint.open import Checkpoint
from torchtune.config.strict import STRICT
from torchtune.errors import ConfigError
from torchtune.modules.decoder import CausalLM
from torchtune.quantization.encoding import quantised_layers
from torchtune.quantization.schemes import Scheme, scheme_of
from torchtune.recipes.params import Count, FinetuneParams

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
    """Whether the model's layers can be rounded so.

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
        quantised_layers(model, scheme)
    except ConfigError as error:
        raise ConfigError("; ".join(problem.message for problem in error.problems), key="qat_group_size") from error
