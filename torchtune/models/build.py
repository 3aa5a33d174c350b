"""From a config.json to a model: the family is found by its `model_type`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torchtune.errors import CheckpointError, UnsupportedError
from torchtune.modules.decoder import CausalLM

Build = Callable[[Mapping[str, Any]], CausalLM]


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        model_type: as in the checkpoint's config.json.
        build: makes the model from the parsed config.json.
        covers: the models that are of it, for people.
    """

    model_type: str
    build: Build
    covers: str = ""


# The file of each model_type in torchtune/models/. Imported when asked for.
FILES = {
    "cohere": "cohere",
    "cohere2": "cohere2",
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "glm": "glm",
    "glm4": "glm4",
    "glm4_moe": "glm4_moe",
    "gpt2": "gpt2",
    "gpt_neox": "gpt_neox",
    "gpt_oss": "gpt_oss",
    "granite": "granite",
    "granitemoe": "granitemoe",
    "granitemoeshared": "granitemoe",
    "llama": "llama",
    "llama4": "llama4",
    "llama4_text": "llama4",
    "ministral": "ministral",
    "ministral3": "ministral3",
    "mistral": "mistral",
    "mistral3": "mistral3",
    "mixtral": "mixtral",
    "olmo2": "olmo2",
    "olmo3": "olmo3",
    "olmoe": "olmoe",
    "phi": "phi",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}
_registered: dict[str, Family] = {}


def register_family(model_type: str, build: Build, *, covers: str = "") -> None:
    """Add a family from outside the package, or replace one.

    Args:
        model_type: as in the checkpoint's config.json.
        build: makes the model from the parsed config.json.
        covers: the models that are of it, for `tune ls --models`.
    """
    _registered[model_type] = Family(model_type, build, covers)


def families() -> list[Family]:
    """All families that are known, by model_type."""
    return [find_family(model_type) for model_type in sorted({*FILES, *_registered})]


def find_family(model_type: str) -> Family:
    """The family of a model_type.

    Raises:
        UnsupportedError: it is unknown; names the nearest that are known.
    """
    if model_type in _registered:
        return _registered[model_type]
    if model_type not in FILES:
        near = difflib.get_close_matches(model_type, {*FILES, *_registered}, n=3, cutoff=0.5)
        raise UnsupportedError(
            f"model_type '{model_type}' is not supported"
            + (f"; the nearest that are: {', '.join(near)}" if near else "")
            + ". `tune ls --models` lists all, and torchtune.models.build.register_family adds one"
        )
    module = import_module(f"torchtune.models.{FILES[model_type]}")
    return Family(model_type, module.build, module.COVERS)


def build_model(config: Mapping[str, Any]) -> CausalLM:
    """The model that a config.json describes; under `torch.device("meta")` it takes no memory.

    Raises:
        UnsupportedError: another architecture, or an option of one that is not built here.
        CheckpointError: a key that it needs is absent.
    """
    model_type = config.get("model_type")
    if not model_type:
        raise CheckpointError("config.json has no 'model_type', so the architecture is unknown")
    architectures = config.get("architectures") or []
    generative = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    if architectures and not any(name.endswith(generative) for name in architectures):
        raise UnsupportedError(f"{', '.join(architectures)} is no causal language model")
    return find_family(str(model_type)).build(config)
