"""Llama 4: layers that see chunks and layers without positions in turn, experts, and a shared one beside them.

The text part of a vision-language checkpoint (`llama4`) is trained; what else it holds is carried along.
Spec: Meta's release of April 2025, as transformers has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchtune.models.config import HFConfig, layer_types
from torchtune.models.from_config import attention_from, decoder_from, feed_forward_from, norms_from, rotary_from
from torchtune.models.mixtures import experts_from, router_from
from torchtune.modules.decoder import CausalLM
from torchtune.modules.layers import DecoderLayer
from torchtune.modules.moe import MoE, choose_then_sigmoid
from torchtune.modules.norms import PlainRMSNorm

COVERS = "Llama 4 Scout, Maverick (text)"
# With sizes: a `text_config` may leave out those that are its defaults.
DEFAULTS = {
    "vocab_size": 202_048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16_384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "rope_theta": 500_000.0,
    "num_experts": 16,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 8192,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
}
NAMES = {"mlp": "feed_forward", "gate": "router", "shared_experts": "shared_expert"}
VISION_PREFIXES = ({"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},)
VISION = (r"^vision_model\.", r"^multi_modal_projector\.")


def build(values: Mapping[str, Any]) -> CausalLM:
    """A Llama 4, or the text part of one that sees, from its config.json."""
    if values.get("model_type") != "llama4":
        return _text_model(values)
    return _text_model(values.get("text_config") or {}, prefix_choices=VISION_PREFIXES, carried=VISION)


def _text_model(values: Mapping[str, Any], **options: Any) -> CausalLM:
    config = HFConfig(values, DEFAULTS)
    config.leave_off_dropout("router_jitter_noise")
    num_layers = config.num_hidden_layers
    every = config.no_rope_layer_interval
    rotated = config.get("no_rope_layers") or [(index + 1) % every for index in range(num_layers)]
    if config.get("layer_types") is None:
        chunks = [config.attention_chunk_size if on else None for on in rotated]
    else:
        types = layer_types(config, ("full_attention", "chunked_attention"))
        chunks = [config.attention_chunk_size if kind == "chunked_attention" else None for kind in types]
    step = config.interleave_moe_layer_step
    with_experts = config.get("moe_layers")
    if with_experts is None:
        with_experts = range(step - 1, num_layers, step)

    def mlp(index: int) -> nn.Module:
        if index not in with_experts:
            return feed_forward_from(config, intermediate_size=config.intermediate_size_mlp)
        experts = experts_from(config, config.intermediate_size, transposed=True, weigh_inputs=True)
        choose = partial(choose_then_sigmoid, top_k=config.num_experts_per_tok)
        return MoE(router_from(config, choose), experts, shared_experts=feed_forward_from(config))

    def layer(index: int) -> DecoderLayer:
        has_norm = config.use_qk_norm and rotated[index]
        tuned = config.attn_temperature_tuning and not rotated[index]
        attention = attention_from(
            config,
            bias=bool(config.attention_bias),
            chunk=chunks[index],
            q_norm=PlainRMSNorm(config.rms_norm_eps) if has_norm else None,
            k_norm=PlainRMSNorm(config.rms_norm_eps) if has_norm else None,
            norm_at="rotated",
            query_scale=_temperature(config) if tuned else None,
        )
        return DecoderLayer(attention, mlp(index), **norms_from(config, "input_layernorm", "post_attention_layernorm"))

    rotary = rotary_from(config, interleaved=True)
    model = decoder_from(
        config, layer, [rotary if rotated[index] else None for index in range(num_layers)], names=NAMES, **options
    )
    model.peft_swaps_experts = True
    return model


def _temperature(config: HFConfig) -> Callable[[Tensor], Tensor]:
    """What queries without a position are scaled by, so that far ones stay sharp. Source: arXiv:2501.19399."""

    def scale(positions: Tensor) -> Tensor:
        return torch.log1p(torch.floor((positions.float() + 1.0) / config.floor_scale)) * config.attn_scale + 1.0

    return scale
