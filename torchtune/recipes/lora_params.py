"""The keys of an adapter: what lora_finetune has besides every fine-tune's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from torchtune.adapters.config import LoRAConfig
from torchtune.config.strict import STRICT
from torchtune.recipes.params import Count, FinetuneParams
from torchtune.training.optimizers import ParamGroup

Positive = Annotated[float, Field(gt=0)]


@dataclass(config=STRICT, kw_only=True)
class LoRAParams(FinetuneParams):
    """The keys of every fine-tune, and those of an adapter."""

    # The update.
    lora_rank: Count = Field(default=16, description="Rank of the update; the adapter grows with it.")
    lora_alpha: Positive = Field(default=32.0, description="The update is scaled by lora_alpha / lora_rank.")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of the update's inputs dropped.")
    lora_targets: str | list[str] = Field(
        default="all-linear",
        description="Layers to adapt: all-linear, attention, mlp, experts, ends of names, regular expressions.",
    )
    lora_layers: list[int] | None = Field(
        default=None, description="Numbers of the decoder layers to adapt, -1 the last; null: all."
    )
    lora_rank_pattern: dict[str, Count] = Field(
        default_factory=dict, description="Other ranks by name: {o_proj: 4}; the first that fits wins."
    )
    lora_alpha_pattern: dict[str, Positive] = Field(default_factory=dict, description="Other alphas by name.")
    use_rslora: bool = Field(default=False, description="Scale by lora_alpha / sqrt(lora_rank).")
    use_dora: bool = Field(default=False, description="Train the lengths of the weights' rows apart (DoRA).")
    lora_init: Literal["default", "gaussian", "pissa", "loftq"] = Field(
        default="default", description="How the update begins; loftq makes up for the base's quantisation."
    )
    loraplus_lr_ratio: Positive | None = Field(
        default=None, description="Rate of lora_B over that of lora_A (LoRA+; 16 in its paper)."
    )
    modules_to_save: list[str] = Field(
        default_factory=list, description="Modules trained whole: embed_tokens, lm_head, norm, by the end of names."
    )

    # The base.
    base_quantization: Literal["none", "nf4", "int8", "int4"] = Field(
        default="none", description="What the frozen base rests in; nf4 is QLoRA's."
    )
    double_quantization: bool = Field(default=True, description="nf4: quantise the blocks' scales too.")
    adapter: str | None = Field(
        default=None, description="A PEFT adapter to go on training; rank and targets are its own."
    )
    frozen_adapters: list[str] = Field(
        default_factory=list, description="PEFT adapters merged into the base, in order, before it is trained on."
    )

    # What is kept.
    save_merged: bool = Field(default=False, description="Write step_N/merged/ too: the whole model.")

    @model_validator(mode="after")
    def _goes_together(self) -> LoRAParams:
        """Pairs of values that can't both be meant."""
        problems = []
        if not self.targets:
            problems.append("lora_targets: names nothing to adapt; leave it out for all linear layers")
        if self.use_dora and self.lora_init in ("pissa", "loftq"):
            problems.append(f"lora_init: '{self.lora_init}' is for plain LoRA; leave use_dora out")
        if self.lora_init == "loftq" and self.base_quantization == "none":
            problems.append("lora_init: 'loftq' makes up for quantisation, and base_quantization is none")
        if self.adapter is not None and self.lora_init != "default":
            problems.append("lora_init: an adapter to go on from is given, so there is nothing to begin")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def targets(self) -> tuple[str, ...]:
        """lora_targets as a list."""
        return (self.lora_targets,) if isinstance(self.lora_targets, str) else tuple(self.lora_targets)


def not_with_qat(params: LoRAParams) -> list[str]:
    """What of an adapter does not go with rounding its merged weights, a line each."""
    problems = []
    if params.base_quantization != "none":
        problems.append("base_quantization: with qat the merged weights are rounded, once; leave it out")
    if params.use_dora:
        problems.append("use_dora: with qat the update is a plain one; leave it out")
    if params.lora_dropout:
        problems.append(
            "lora_dropout: with qat the merged weights are computed with, so nothing is dropped; leave it out"
        )
    if params.lora_init == "pissa":
        problems.append("lora_init: 'pissa' splits the weights that qat rounds; leave it out")
    return problems


def lora_config(params: LoRAParams) -> LoRAConfig:
    """The adapter that the keys describe."""
    return LoRAConfig(
        rank=params.lora_rank,
        alpha=params.lora_alpha,
        dropout=params.lora_dropout,
        targets=params.targets,
        layers=None if params.lora_layers is None else tuple(params.lora_layers),
        use_rslora=params.use_rslora,
        use_dora=params.use_dora,
        rank_pattern=params.lora_rank_pattern,
        alpha_pattern=params.lora_alpha_pattern,
        modules_to_save=tuple(params.modules_to_save),
        init=params.lora_init,
    )


def lora_groups(params: LoRAParams) -> list[ParamGroup]:
    """The rate of lora_B, where it is another than lora_A's. Source: Hayou et al., 2024 (LoRA+, arXiv:2402.12354)."""
    ratio = params.loraplus_lr_ratio
    return [] if ratio is None else [ParamGroup(r"\.lora_(embedding_)?B(\.|$)", {"lr_ratio": ratio})]
