"""What a LoRA adapter is: its rank, scale and places."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from torchtune.errors import ConfigError

Init = Literal["default", "gaussian", "pissa", "loftq"]
Value = TypeVar("Value")


@dataclass(frozen=True)
class LoRAConfig:
    """A low-rank update of chosen layers: W x + scale * B A x. Source: Hu et al., 2021 (arXiv:2106.09685).

    Attributes:
        rank: of the update.
        alpha: the update is scaled by alpha / rank.
        dropout: share of the update's inputs that are dropped in training.
        targets: the layers; torchtune/adapters/targets.py says how they are named.
        layers: numbers of the decoder layers to adapt; None means all.
        use_rslora: scale by alpha / sqrt(rank). Source: Kalajdzievski, 2023 (arXiv:2312.03732).
        use_dora: train the magnitude of each of W's rows apart. Source: Liu et al., 2024 (arXiv:2402.09353).
        rank_pattern, alpha_pattern: other ranks and alphas by name: the end of a layer's name or a regular
            expression for it; the first that fits wins.
        modules_to_save: modules trained whole beside the adapter, by the end of their names.
        init: how A and B begin; torchtune/adapters/init.py.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)
    layers: tuple[int, ...] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    init: Init = "default"

    def rank_of(self, name: str) -> int:
        """The rank at the layer of this name."""
        return _first_match(self.rank_pattern, name, self.rank, key="lora_rank_pattern")

    def alpha_of(self, name: str) -> float:
        """The alpha at the layer of this name."""
        return _first_match(self.alpha_pattern, name, self.alpha, key="lora_alpha_pattern")

    def scale_of(self, name: str) -> float:
        """What the update of the layer of this name is multiplied by."""
        rank = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(rank) if self.use_rslora else rank)


def _first_match(pattern: Mapping[str, Value], name: str, default: Value, *, key: str) -> Value:
    for ends, value in pattern.items():
        try:
            if re.fullmatch(rf"(.*\.)?({ends})", name):
                return value
        except re.error as error:
            raise ConfigError(f"'{ends}' is no regular expression: {error.msg}", key=key) from error
    return default
