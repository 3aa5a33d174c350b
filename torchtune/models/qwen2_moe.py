"""Qwen1.5's and Qwen2's mixture of experts: Qwen2's attention, experts, and a shared one behind a gate.

Spec: arXiv:2407.10671.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from torchtune.models.config import HFConfig, layer_windows
from torchtune.models.from_config import attention_from, decoder_from, feed_forward_from, norms_from, rotary_from
from torchtune.models.mixtures import GATE_UP_DOWN, experts_from, router_from, router_loss_from
from torchtune.models.qwen3_moe import has_experts
from torchtune.modules.decoder import CausalLM
from torchtune.modules.layers import DecoderLayer
from torchtune.modules.linear import Linear
from torchtune.modules.moe import MoE

COVERS = "Qwen1.5 MoE A2.7B, Qwen2 57B-A14B"
DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "num_key_value_heads": 16,
    "qkv_bias": True,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
    "num_experts": 60,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}
NAMES = {"shared_experts": "shared_expert"}


def build(values: Mapping[str, Any]) -> CausalLM:
    """A Qwen2 mixture of experts from its config.json."""
    config = HFConfig(values, DEFAULTS)
    windows = _windows(config)

    def mlp(index: int) -> nn.Module:
        if not has_experts(config, index):
            return feed_forward_from(config)
        return MoE(
            router_from(config),
            experts_from(config, config.moe_intermediate_size, separate=GATE_UP_DOWN),
            shared_experts=feed_forward_from(config, intermediate_size=config.shared_expert_intermediate_size),
            shared_expert_gate=Linear(config.hidden_size, 1, bias=False),
        )

    def layer(index: int) -> DecoderLayer:
        return DecoderLayer(
            attention_from(config, qkv_bias=bool(config.qkv_bias), window=windows[index]),
            mlp(index),
            **norms_from(config, "input_layernorm", "post_attention_layernorm"),
        )

    return decoder_from(config, layer, rotary_from(config), names=NAMES, router_loss=router_loss_from(config))


def _windows(config: HFConfig) -> list[int | None]:
    """None unless `use_sliding_window`, then every other of the first `max_window_layers` layers."""
    if not config.use_sliding_window:
        return [None] * config.num_hidden_layers
    if config.get("layer_types") is not None:
        return layer_windows(config)
    slides = [index % 2 == 0 and index < config.max_window_layers for index in range(config.num_hidden_layers)]
    return [config.sliding_window if on else None for on in slides]
