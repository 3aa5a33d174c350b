"""Cohere 2: Cohere's layer, three with a window and positions, then one that sees all and knows none.

Spec: arXiv:2504.00698.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchtune.models import cohere
from torchtune.models.config import HFConfig, layer_types
from torchtune.modules.decoder import CausalLM

COVERS = "Command R7B, Command A; Tiny Aya"
DEFAULTS = {**cohere.DEFAULTS, "rope_theta": 10_000.0, "sliding_window": 4096, "sliding_window_pattern": 4}


def build(values: Mapping[str, Any]) -> CausalLM:
    """A Cohere 2 from its config.json."""
    config = HFConfig(values, DEFAULTS)
    config.refuse("use_qk_norm", (False, None))
    types = layer_types(config, full_every=config.sliding_window_pattern)
    windows = [config.sliding_window if kind == "sliding_attention" else None for kind in types]
    return cohere.cohere_from(config, windows, [window is not None for window in windows])
