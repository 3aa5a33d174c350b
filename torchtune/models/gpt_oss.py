"""gpt-oss: attention sinks, windows in every other layer, and experts with biases and a clamped gate.

Spec: arXiv:2508.10925. Released checkpoints hold the experts in MXFP4, which torchtune/checkpoint/mxfp4.py reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchtune.models.config import HFConfig, layer_windows
from torchtune.models.from_config import attention_from, decoder_from, norms_from, rotary_from
from torchtune.models.mixtures import experts_from, router_from, router_loss_from
from torchtune.modules.decoder import CausalLM
from torchtune.modules.layers import DecoderLayer
from torchtune.modules.moe import MoE, choose_then_softmax

COVERS = "gpt-oss 20b, 120b"
DEFAULTS = {
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "rope_theta": 150_000.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "head_dim": 64,
    "num_key_value_heads": 8,
    "attention_bias": True,
    "sliding_window": 128,
    "num_experts": 128,
    "num_experts_per_tok": 4,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "router_aux_loss_coef": 0.001,
}
NAMES = {"gate": "router"}


def build(values: Mapping[str, Any]) -> CausalLM:
    """A gpt-oss from its config.json."""
    config = HFConfig(values, DEFAULTS)
    if config.get("layer_types") is None:
        types = [("sliding_attention", "full_attention")[index % 2] for index in range(config.num_hidden_layers)]
        config = HFConfig({**values, "layer_types": types}, DEFAULTS)
    windows = layer_windows(config)
    choose = partial(choose_then_softmax, top_k=config.num_experts_per_tok)
    gated = partial(clamped_swiglu, alpha=config.swiglu_alpha, limit=config.swiglu_limit)

    def layer(index: int) -> DecoderLayer:
        options = {"gated": gated, "interleaved": True, "bias": True, "transposed": True}
        experts = experts_from(config, config.intermediate_size, **options)
        return DecoderLayer(
            attention_from(config, bias=bool(config.attention_bias), window=windows[index], has_sinks=True),
            MoE(router_from(config, choose, bias=True), experts),
            **norms_from(config, "input_layernorm", "post_attention_layernorm"),
        )

    return decoder_from(config, layer, rotary_from(config), names=NAMES, router_loss=router_loss_from(config))


def clamped_swiglu(gate_up: Tensor, *, alpha: float, limit: float) -> Tensor:
    """(up + 1) gate sigmoid(alpha gate) of [N, 2 F], gate and up in turn, both held within the limit."""
    gate = gate_up[..., ::2].clamp(max=limit)
    up = gate_up[..., 1::2].clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)
