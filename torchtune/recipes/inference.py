"""What the recipes that ask a model share: their keys, the model that these mean, and its prompts."""

from __future__ import annotations

from dataclasses import dataclass as plain_dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from torchtune.config.strict import STRICT
from torchtune.data.options import SpecialTokensInContent
from torchtune.data.prompts import Prompter
from torchtune.data.template import choose_template
from torchtune.errors import ConfigError
from torchtune.generation.sampling import Sampling
from torchtune.modules.decoder import CausalLM
from torchtune.modules.decoding import ready_to_decode
from torchtune.recipes.adapted import AdaptedCheckpoint, Quantization
from torchtune.recipes.params import Count
from torchtune.tokenizers.tokenizer import Tokenizer
from torchtune.training.device import get_device
from torchtune.training.precision import get_dtype


@dataclass(config=STRICT, kw_only=True)
class ModelParams:
    """Which model is asked, and how it computes."""

    model_checkpoint: str | None = Field(
        default=None,
        description="Folder, GGUF file or hub id; by default the base that the adapter names. An adapter's folder too.",
    )
    adapter: str | list[str] = Field(
        default_factory=list, description="PEFT adapters, folders or hub ids, merged in this order."
    )
    base_quantization: Quantization = Field(
        default="auto",
        description="What the adapter was trained over; it is merged into that. auto: as its run says, else none.",
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = Field(
        default="auto", description="What is computed in; auto: bf16 where the device multiplies it fast, else fp32."
    )
    device: str = Field(default="auto", description="cpu, cuda, cuda:N, mps; auto: CUDA if there is any.")

    @model_validator(mode="after")
    def _names_a_model(self) -> ModelParams:
        if self.model_checkpoint is None and not self.adapters:
            raise ValueError("model_checkpoint: neither it nor an adapter is given; name one")
        return self

    @property
    def adapters(self) -> list[str]:
        """All adapters."""
        return [self.adapter] if isinstance(self.adapter, str) else self.adapter


@dataclass(config=STRICT, kw_only=True)
class PromptParams:
    """How prompts are put to the model."""

    system: str | None = Field(default=None, description="System message of prompts that have none.")
    apply_chat_template: bool | None = Field(
        default=None,
        description="Texts are a user's message (true) or what is gone on with (false); by default as the model has one.",
    )
    chat_template: str | None = Field(
        default=None, description="A .jinja file, the name of one of the checkpoint's templates, or a template's text."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Variables for the template, e.g. {enable_thinking: false}."
    )
    special_tokens_in_content: SpecialTokensInContent = Field(
        default="split",
        description="A special token's text in a message: refuse it, encode it as plain text, or as the token.",
    )


@dataclass(config=STRICT, kw_only=True)
class SamplingParams:
    """How tokens are chosen."""

    max_new_tokens: Count = Field(default=256, description="Tokens of an answer at most.")
    temperature: float = Field(default=0.0, ge=0, description="0: always the most likely token.")
    top_k: int = Field(default=0, ge=0, description="Only so many of the most likely tokens; 0: all.")
    top_p: float = Field(
        default=1.0, ge=0, le=1, description="Only the most likely ones that together have it; 1: all."
    )
    min_p: float = Field(
        default=0.0, ge=0, le=1, description="Only those this many times as likely as the first; 0: all."
    )
    repetition_penalty: float = Field(
        default=1.0, gt=0, description="Makes tokens that are there less likely; 1: none."
    )
    stop: str | list[str] = Field(default_factory=list, description="Texts that end an answer, not part of it.")
    seed: int = Field(default=42, ge=0, description="Of what is drawn; each prompt has numbers of its own.")

    @property
    def sampling(self) -> Sampling:
        """The part that looks at logits."""
        return Sampling(self.repetition_penalty, self.temperature, self.top_k, self.top_p, self.min_p)

    @property
    def stops(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop


@plain_dataclass
class Asked:
    """A model that is ready to be asked.

    Attributes:
        checkpoint: where it comes from; its stop tokens and files.
        prompter: encodes its prompts.
    """

    adapted: AdaptedCheckpoint
    tokenizer: Tokenizer
    prompter: Prompter

    @property
    def as_chat(self) -> bool:
        """Whether a text is a user's message."""
        return self.prompter.has_template

    @property
    def context(self) -> int | None:
        """Positions that the model has."""
        return self.adapted.model.model.max_positions

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer."""
        return self.adapted.checkpoint.stop_ids

    def load(self, params: ModelParams) -> CausalLM:
        """Read the weights.

        Raises:
            CheckpointError: a file is cut or damaged.
        """
        device = get_device(params.device)
        model = self.adapted.load(dtype=get_dtype(params.dtype, device), device=device)
        with torch.no_grad():
            ready_to_decode(model)
        return model


def open_asked(model: ModelParams, prompts: PromptParams) -> Asked:
    """Open the model that the params name; no weight is read.

    Raises:
        ConfigError, CheckpointError, DataError: what is named is not there, does not fit or is no template.
    """
    get_dtype(model.dtype, get_device(model.device))
    adapted = AdaptedCheckpoint.open(model.model_checkpoint, model.adapters, quantization=model.base_quantization)
    tokenizer = adapted.checkpoint.tokenizer()
    templates = choose_template(prompts.chat_template, adapted.checkpoint.chat_template)
    if prompts.apply_chat_template and templates is None:
        raise ConfigError("the model has no chat template; give one as chat_template", key="apply_chat_template")
    prompter = Prompter(
        tokenizer,
        None if prompts.apply_chat_template is False else templates,
        variables=prompts.chat_template_kwargs,
        special_tokens_in_content=prompts.special_tokens_in_content,
    )
    return Asked(adapted, tokenizer, prompter)
