"""Granite's mixtures of experts: the dense Granite's layer and multipliers, with experts, and perhaps a shared one.

Spec: the configs and weights of Granite 3 and 4. Checkpoints hold all experts of a layer as one tensor under names
of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torchtune.models import granite
from torchtune.models.config import HFConfig
from torchtune.models.from_config import attention_from, decoder_from, feed_forward_from, norms_from, rotary_from
from torchtune.models.mixtures import experts_from, router_from, router_loss_from
from torchtune.modules.decoder import CausalLM
from torchtune.modules.layers import DecoderLayer
from torchtune.modules.moe import Experts, MoE, Router, choose_then_softmax
from torchtune.modules.stored import Piece, Stored

COVERS = "Granite 3.0, 3.1 MoE (1B-A400M, 3B-A800M)"
DEFAULTS = {
    **granite.DEFAULTS,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 0,
    "router_aux_loss_coef": 0.001,
}
NAMES = {
    "mlp": "block_sparse_moe",
    "gate": "router",
    # The shared expert's; the others' are in `GraniteMoE`.
    "gate_up_proj": "input_linear",
    "down_proj": "output_linear",
}


class GraniteMoE(MoE, Stored):
    """A mixture whose tensors have other names on disk than in memory."""

    def __init__(self, gate: Router, experts: Experts) -> None:
        super().__init__(gate, experts)
        self.layouts = (self._released, self._in_memory)
        self.layout = self.layouts[0]

    def _released(self) -> dict[str, list[Piece]]:
        return {
            "experts.gate_up_proj": [Piece("input_linear.weight")],
            "experts.down_proj": [Piece("output_linear.weight")],
            "router.weight": [Piece("router.layer.weight")],
        }

    def _in_memory(self) -> dict[str, list[Piece]]:
        return {name: [Piece(name)] for name in self._released()}


def build(values: Mapping[str, Any]) -> CausalLM:
    """A Granite mixture of experts from its config.json."""
    config = HFConfig(values, DEFAULTS)
    choose = partial(choose_then_softmax, top_k=config.num_experts_per_tok)
    shared_size = config.shared_intermediate_size if config.model_type == "granitemoeshared" else 0

    def layer(index: int) -> DecoderLayer:
        shared = feed_forward_from(config, intermediate_size=shared_size, fused=True) if shared_size else None
        return DecoderLayer(
            attention_from(config, bias=bool(config.attention_bias), scale=config.attention_multiplier),
            GraniteMoE(router_from(config, choose), experts_from(config, config.intermediate_size)),
            shared_mlp=shared,
            residual_scale=config.residual_multiplier,
            **norms_from(config, "input_layernorm", "post_attention_layernorm"),
        )

    return decoder_from(
        config,
        layer,
        rotary_from(config),
        names=NAMES,
        decoder={"embedding_scale": config.embedding_multiplier},
        logit_scale=1 / config.logits_scaling,
        router_loss=router_loss_from(config),
    )
