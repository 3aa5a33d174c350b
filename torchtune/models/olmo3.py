"""OLMo 3: OLMo 2's layer, with windows on three layers of four and a stretched rotation on the fourth alone.

Spec: the configs and weights of OLMo 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchtune.errors import UnsupportedError
from torchtune.models import olmo2
from torchtune.models.config import HFConfig, layer_types
from torchtune.models.from_config import rotary_from
from torchtune.modules.decoder import CausalLM

COVERS = "OLMo 3 (7B, 32B)"
THETA = 500_000.0
DEFAULTS = {**olmo2.DEFAULTS, "sliding_window": 4096, "rope_theta": THETA}


def build(values: Mapping[str, Any]) -> CausalLM:
    """An OLMo 3 from its config.json."""
    config = HFConfig(values, DEFAULTS)
    types = layer_types(config, full_every=4)
    rotary = {kind: rotary_from(config, _rope(config, kind)) for kind in set(types)}
    windows = [config.sliding_window if kind == "sliding_attention" else None for kind in types]
    return olmo2.olmo_from(config, windows, [rotary[kind] for kind in types])


def _rope(config: HFConfig, kind: str) -> dict[str, Any]:
    """The rotary options of a kind of layer; the older `rope_theta` and `rope_scaling` are those that see all."""
    given = config.get("rope_parameters") or {}
    if given and not {"full_attention", "sliding_attention"} & given.keys():
        raise UnsupportedError(
            "config.json: rope_parameters of an OLMo 3 stand under 'full_attention' and 'sliding_attention', "
            f"not at once for all layers: {given}"
        )
    if kind == "full_attention":
        return {**config.rope_parameters_of(kind), **(config.get("rope_scaling") or {})}
    return config.rope_parameters_of(kind, rope_theta=THETA)
