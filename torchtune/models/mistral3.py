"""Mistral Small 3.1 and Ministral 3 as they are published: a Mistral or Ministral 3 that sees.

The text part is trained; vision tower and projector are carried along.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchtune.errors import UnsupportedError
from torchtune.models import ministral, ministral3, mistral
from torchtune.models.gemma3 import VISION, VISION_NAMES, VISION_PREFIXES
from torchtune.modules.decoder import CausalLM

COVERS = "Mistral Small 3.1, 3.2; Ministral 3 (the text part)"
TEXT = {"mistral": mistral, "ministral": ministral, "ministral3": ministral3}


def build(values: Mapping[str, Any]) -> CausalLM:
    """The text part from the config.json of the whole.

    Raises:
        UnsupportedError: a text part of another kind.
    """
    text = values.get("text_config") or {}
    model_type = text.get("model_type", "mistral")
    if model_type not in TEXT:
        raise UnsupportedError(
            f"config.json: text_config: model_type '{model_type}' is not supported; supported: {', '.join(TEXT)}"
        )
    # The first of the two that says whether the head is tied is right; published ones that don't have a head.
    tied = values.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    values = {**text, "tie_word_embeddings": tied}
    model = TEXT[model_type].build(values, prefix_choices=VISION_PREFIXES, carried=VISION)
    model.names_in_transformers = VISION_NAMES
    return model
