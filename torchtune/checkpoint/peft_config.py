"""What an adapter_config.json says in numbers: as text too, and as PEFT's defaults where a key is left out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torchtune.adapters.config import LoRAConfig
from torchtune.checkpoint.peft_names import CONFIG
from torchtune.errors import CheckpointError

DEFAULTS = {"r": 8.0, "lora_alpha": 8.0, "lora_dropout": 0.0}


def lora_config(given: Mapping[str, Any]) -> LoRAConfig:
    """Rank, alpha and so on; what it targets is seen by the tensors.

    Raises:
        CheckpointError: a value that can't be meant; names its key.
    """
    dropout = _number(given, "lora_dropout")
    if not 0 <= dropout < 1:
        raise CheckpointError(f"{CONFIG}: lora_dropout: {dropout} is no share of inputs that could be dropped")
    ranks = _pattern(given, "rank_pattern")
    return LoRAConfig(
        rank=_as_rank("r", _number(given, "r")),
        alpha=_number(given, "lora_alpha"),
        dropout=dropout,
        use_rslora=bool(given.get("use_rslora")),
        use_dora=bool(given.get("use_dora")),
        rank_pattern={ends: _as_rank(f"rank_pattern: {ends}", value) for ends, value in ranks.items()},
        alpha_pattern=_pattern(given, "alpha_pattern"),
    )


def target_parameters(given: Mapping[str, Any]) -> list[str]:
    """The ends of names of parameters that were named as such, and not by their layers.

    Raises:
        CheckpointError: it is no list.
    """
    names = given.get("target_parameters") or []
    if not isinstance(names, list):
        raise CheckpointError(f"{CONFIG}: target_parameters: {names} is no list of names")
    return [str(name) for name in names]


def _number(given: Mapping[str, Any], key: str) -> float:
    value = given.get(key)
    return DEFAULTS[key] if value is None else _as_number(key, value)


def _pattern(given: Mapping[str, Any], key: str) -> dict[str, float]:
    """Numbers by regular expressions for the ends of names."""
    values = given.get(key) or {}
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{CONFIG}: {key}: {values} gives no numbers by names")
    for ends in values:
        try:
            re.compile(ends)
        except re.error as error:
            raise CheckpointError(f"{CONFIG}: {key}: '{ends}' is no regular expression: {error}") from error
    return {ends: _as_number(f"{key}: {ends}", value) for ends, value in values.items()}


def _as_number(key: str, value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]  # what is no number raises
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{CONFIG}: {key}: '{value}' is no number") from error
    if not math.isfinite(number):
        raise CheckpointError(f"{CONFIG}: {key}: {value} is not finite")
    return number


def _as_rank(key: str, value: float) -> int:
    if value < 1 or value != int(value):
        raise CheckpointError(f"{CONFIG}: {key}: {value:g} is no rank")
    return int(value)
