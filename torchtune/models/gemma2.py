"""Gemma 2: norms before and after each block, soft-capped scores and logits, windows on every second layer.

Spec: arXiv:2408.00118.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchtune.models.config import HFConfig, layer_types
from torchtune.models.from_config import attention_from, decoder_from, feed_forward_from, norms_from, rotary_from
from torchtune.modules.decoder import CausalLM
from torchtune.modules.layers import SandwichNormLayer
from torchtune.modules.norms import RMSNorm
from torchtune.modules.rotary import RotaryEmbedding

COVERS = "Gemma 2"
DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "head_dim": 256,
    "num_key_value_heads": 4,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def build(values: Mapping[str, Any]) -> CausalLM:
    """A Gemma 2 from its config.json."""
    config = HFConfig(values, DEFAULTS)
    return gemma_from(
        config,
        layer_types(config, full_every=2),
        rotary_from(config),
        softcap=config.attn_logit_softcapping,
        logit_softcap=config.final_logit_softcapping,
    )


def gemma_from(
    config: HFConfig,
    types: Sequence[str],
    rotary: RotaryEmbedding | Sequence[RotaryEmbedding],
    *,
    softcap: float | None,
    head_norms: bool = False,
    **options: Any,
) -> CausalLM:
    """A Gemma of the second kind or later.

    Args:
        types: the kind of each layer.
        head_norms: whether each query and key head has a norm (Gemma 3).
        options: as in `decoder_from`.
    """
    config.refuse("use_bidirectional_attention", (None, False))

    def norms_of_heads() -> dict[str, Any]:
        names = ("q_norm", "k_norm") if head_norms else ()
        return {name: RMSNorm(config.head_dim, config.rms_norm_eps, from_one=True) for name in names}

    def layer(index: int) -> SandwichNormLayer:
        return SandwichNormLayer(
            attention_from(
                config,
                bias=bool(config.attention_bias),
                scale=config.query_pre_attn_scalar**-0.5,
                window=config.sliding_window if types[index] == "sliding_attention" else None,
                softcap=softcap,
                **norms_of_heads(),
            ),
            feed_forward_from(config, act="hidden_activation"),
            **norms_from(config, *NORMS, from_one=True),
        )

    return decoder_from(
        config,
        layer,
        rotary,
        norm=RMSNorm(config.hidden_size, config.rms_norm_eps, from_one=True),
        decoder={"embedding_scale": config.hidden_size**0.5},
        **options,
    )
