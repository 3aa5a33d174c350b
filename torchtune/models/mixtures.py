"""Mixtures of experts from a config's usual keys; what a family has otherwise, its file passes."""

from __future__ import annotations

from functools import partial
from typing import Any

from torchtune.errors import CheckpointError
from torchtune.models.config import HFConfig
from torchtune.models.from_config import activation_from
from torchtune.modules.moe import Choose, Experts, Router, gated_by, softmax_then_choose

GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")


def num_experts(config: HFConfig) -> int:
    """How many experts a layer has, under any of the names that configs have for it.

    Raises:
        CheckpointError: none of them is there.
    """
    for name in ("num_local_experts", "n_routed_experts"):
        if config.get(name) is not None:
            return int(config.get(name))
    return int(config.num_experts)


def experts_from(config: HFConfig, intermediate_size: int, **options: Any) -> Experts:
    """The experts of a layer; `options` are those of `Experts`."""
    if "gated" not in options:
        options["gated"] = gated_by(activation_from(config))
    return Experts(num_experts(config), config.hidden_size, intermediate_size, **options)


def router_from(config: HFConfig, choose: Choose | None = None, **options: Any) -> Router:
    """The router of a layer: a softmax over all experts, of which the largest `num_experts_per_tok` count.

    Args:
        choose: another way to choose; `options` are those of `Router`.
    Raises:
        CheckpointError: a token is to have more experts than there are.
    """
    if not 0 < config.num_experts_per_tok <= num_experts(config):
        raise CheckpointError(
            f"config.json: num_experts_per_tok: {config.num_experts_per_tok} of {num_experts(config)} experts"
        )
    if choose is None:
        normalised = bool(config.get("norm_topk_prob", False))
        choose = partial(softmax_then_choose, top_k=config.num_experts_per_tok, normalised=normalised)
    return Router(config.hidden_size, num_experts(config), choose, **options)


def router_loss_from(config: HFConfig) -> tuple[float, int] | None:
    """Weight of the load-balancing loss and experts a token, where the config asks for it."""
    if not config.get("output_router_logits"):
        return None
    return float(config.router_aux_loss_coef), int(config.num_experts_per_tok)
