"""Phi-3: Llama's layer with queries, keys and values in one matrix, gate and up in another, and longrope.

Longer contexts turn by other frequencies, per document (`_longrope` in torchtune/modules/rotary.py).
Spec: arXiv:2404.14219, arXiv:2412.08905 (Phi-4).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchtune.models.config import HFConfig
from torchtune.models.from_config import attention_from, decoder_from, feed_forward_from, norms_from, rotary_from
from torchtune.modules.decoder import CausalLM
from torchtune.modules.layers import DecoderLayer

COVERS = "Phi-3, Phi-3.5 (mini, medium), Phi-4, Phi-4-mini"
DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "sliding_window": None,
}
# What the first releases called longrope.
OLD_NAMES = ("su", "yarn")


def build(values: Mapping[str, Any]) -> CausalLM:
    """A Phi-3 from its config.json."""
    config = HFConfig(values, DEFAULTS)
    config.leave_off_dropout("resid_pdrop", "embd_pdrop")

    def layer(index: int) -> DecoderLayer:
        return DecoderLayer(
            attention_from(config, fused="whole", window=config.sliding_window),
            feed_forward_from(config, fused=True),
            **norms_from(config, "input_layernorm", "post_attention_layernorm"),
        )

    return decoder_from(config, layer, rotary_from(config, _rope(config)))


def _rope(config: HFConfig) -> dict[str, Any]:
    rope = config.rope_parameters
    if rope["rope_type"] in OLD_NAMES:
        rope["rope_type"] = "longrope"
    return rope
