"""Gemma 3: Gemma 2's layer with norms on heads instead of soft caps, and frequencies of their own for sliding layers.

The text part of a vision-language checkpoint (`gemma3`) is trained; what else it holds is carried along.
Spec: arXiv:2503.19786.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchtune.errors import UnsupportedError
from torchtune.models import gemma2
from torchtune.models.config import HFConfig, layer_types
from torchtune.models.from_config import rotary_from
from torchtune.modules.decoder import CausalLM
from torchtune.modules.rotary import RotaryEmbedding

COVERS = "Gemma 3 (270M and 1B; the text part of 4B, 12B, 27B); MedGemma"
# With sizes: a `text_config` leaves out those that are its defaults.
DEFAULTS = {
    **gemma2.DEFAULTS,
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "max_position_embeddings": 131_072,
    "final_logit_softcapping": None,
    "sliding_window_pattern": 6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}
VISION_PREFIXES = (
    {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    {"model.": "model.language_model.", "lm_head.": "lm_head."},
)
VISION_NAMES = {"model.": "model.language_model."}
VISION = (r"(^|\.)vision_tower\.", r"(^|\.)multi_modal_projector\.")


def build(values: Mapping[str, Any]) -> CausalLM:
    """A Gemma 3, or the text part of one that sees, from its config.json."""
    if values.get("model_type") != "gemma3":
        return _text_model(values)
    text = {**(values.get("text_config") or {}), "tie_word_embeddings": values.get("tie_word_embeddings", True)}
    # transformers caps the logits of the text model alone.
    model = _text_model({**text, "final_logit_softcapping": None}, prefix_choices=VISION_PREFIXES, carried=VISION)
    model.names_in_transformers = VISION_NAMES
    return model


def _text_model(values: Mapping[str, Any], **options: Any) -> CausalLM:
    config = HFConfig(values, DEFAULTS)
    types = layer_types(config, full_every=config.sliding_window_pattern)
    rotary = _rotary(config)
    return gemma2.gemma_from(
        config,
        types,
        [rotary[kind] for kind in types],
        softcap=None,  # the key is still there, but norms of heads took its place
        logit_softcap=config.final_logit_softcapping,
        head_norms=True,
        **options,
    )


def _rotary(config: HFConfig) -> dict[str, RotaryEmbedding]:
    """By kind of layer; in the older spelling `rope_scaling` is that of the layers that see all."""
    given = config.get("rope_parameters")
    if given and not {"full_attention", "sliding_attention"} & given.keys():
        raise UnsupportedError(
            "config.json: rope_parameters of a Gemma 3 stand under 'full_attention' and 'sliding_attention', "
            f"not at once for all layers: {given}"
        )
    full = config.rope_parameters_of("full_attention") if given else config.rope_parameters
    sliding = config.rope_parameters_of("sliding_attention", rope_theta=config.rope_local_base_freq)
    return {"full_attention": rotary_from(config, full), "sliding_attention": rotary_from(config, sliding)}
