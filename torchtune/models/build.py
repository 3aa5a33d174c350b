"""From a config.json to a model: the family is found by its `model_type`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torchtune.errors import CheckpointError, UnsupportedError, did_you_mean
from torchtune.models import llama, mistral, qwen2, qwen3
from torchtune.modules.decoder import CausalLM

FAMILIES: dict[str, Callable[[Mapping[str, Any]], CausalLM]] = {
    "llama": llama.build,
    "mistral": mistral.build,
    "qwen2": qwen2.build,
    "qwen3": qwen3.build,
}


def register_family(model_type: str, build: Callable[[Mapping[str, Any]], CausalLM]) -> None:
    """Add a family from outside the package.

    Args:
        model_type: as in the checkpoint's config.json.
        build: makes the model from the parsed config.json.
    """
    FAMILIES[model_type] = build


def build_model(config: Mapping[str, Any]) -> CausalLM:
    """The model that a config.json describes; under `torch.device("meta")` it takes no memory.

    Raises:
        UnsupportedError: another architecture, or an option of one that is not built here.
        CheckpointError: a key that it needs is absent.
    """
    model_type = config.get("model_type")
    if not model_type:
        raise CheckpointError("config.json has no 'model_type', so the architecture is unknown")
    if model_type not in FAMILIES:
        names = ", ".join(config.get("architectures") or [])
        raise UnsupportedError(
            f"model_type '{model_type}'{f' ({names})' if names else ''} is not supported"
            f"{did_you_mean(str(model_type), FAMILIES)}"
        )
    architectures = config.get("architectures") or []
    if architectures and not any(name.endswith("ForCausalLM") for name in architectures):
        raise UnsupportedError(f"{', '.join(architectures)} is no causal language model")
    return FAMILIES[model_type](config)
