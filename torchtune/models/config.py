"""A checkpoint's config.json, read with the defaults that its family has.

The two spellings of rotary options (`rope_theta` + `rope_scaling`, and `rope_parameters`) become one,
and options that would change the numbers but are not built here are refused by name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torchtune.errors import CheckpointError, UnsupportedError

logger = logging.getLogger(__name__)

_NO_DEFAULT = object()
SIZES = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}


class HFConfig:
    """The keys of a config.json as attributes.

    Args:
        values: the parsed file.
        defaults: what its family assumes for keys that are absent.
    Raises:
        CheckpointError: on reading a key that is neither there nor has a default, or a size that is none.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
        self._values = {**(defaults or {}), **values}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        value = self.get(name, _NO_DEFAULT)
        if value is _NO_DEFAULT:
            raise CheckpointError(f"config.json has no '{name}', which this model needs")
        if name in SIZES and (type(value) is not int or value < 1):
            raise CheckpointError(f"config.json: {name}: {value!r} is no size; a whole number above 0 is needed")
        return value

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key, or `default`."""
        return self._values.get(name, default)

    @property
    def head_dim(self) -> int:
        """Size of a head: given, or hidden_size over the number of heads."""
        return int(self.get("head_dim") or self.hidden_size // self.num_attention_heads)

    @property
    def num_key_value_heads(self) -> int:
        """Key/value heads: given, or as many as query heads."""
        return int(self.get("num_key_value_heads") or self.num_attention_heads)

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """The rotary options in the newer spelling, with `rope_type` and `rope_theta`.

        Where both spellings stand, the older one wins, as in transformers.
        """
        return self._complete(self.get("rope_scaling") or self.get("rope_parameters") or {}, self._rope_theta)

    def rope_parameters_of(self, layer_type: str, *, rope_theta: float | None = None) -> dict[str, Any]:
        """The rotary options of a kind of layer, where each kind has its own; else those of all.

        Args:
            layer_type: as in `layer_types`.
            rope_theta: the base of this kind, where the config does not say it.
        """
        given = self.get("rope_parameters") or {}
        by_type = any(isinstance(options, Mapping) for options in given.values())
        options = (given.get(layer_type) or {}) if by_type else given
        return self._complete(options, self._rope_theta if rope_theta is None else rope_theta)

    @property
    def _rope_theta(self) -> float:
        return float(self.get("rope_theta") or 10_000.0)

    def _complete(self, options: Mapping[str, Any], rope_theta: float) -> dict[str, Any]:
        rope = dict(options)
        rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
        if rope.get("rope_theta") is None:
            rope["rope_theta"] = rope_theta
        if self.get("partial_rotary_factor") is not None:
            rope.setdefault("partial_rotary_factor", self.partial_rotary_factor)
        if self.get("original_max_position_embeddings") is not None:  # Phi-3 has it beside the options, and means it
            rope["original_max_position_embeddings"] = self.original_max_position_embeddings
        return rope

    def reach(self, positions: int) -> int:
        """The positions of a model whose config says so many.

        More where the frequencies stretch with a text beyond them (dynamic); what other kinds stretch is in the
        number already.
        """
        rope = self.rope_parameters
        factor = rope.get("factor") if rope["rope_type"] == "dynamic" else None
        return int(positions * (factor or 1))

    def leave_off_dropout(self, *names: str) -> None:
        """Say once which dropout of pre-training is not applied; fine-tuning here uses none."""
        for name in names:
            if self.get(name):
                logger.warning("config.json: %s: %s is not applied; fine-tuning uses no dropout", name, self.get(name))

    def refuse(self, name: str, allowed: tuple[Any, ...]) -> None:
        """Refuse a value of `name` that is not built here.

        Raises:
            UnsupportedError: names the key, its value and what is allowed.
        """
        value = self.get(name, allowed[0])
        if value not in allowed:
            raise UnsupportedError(f"config.json: {name}: {value!r} is not supported; supported: {allowed}")


def layer_types(
    config: HFConfig,
    allowed: tuple[str, ...] = ("full_attention", "sliding_attention"),
    *,
    full_every: int | None = None,
) -> list[str]:
    """The kind of each layer's attention, as `layer_types` has it.

    Args:
        full_every: where the config has no `layer_types`, every so-manieth layer sees all and the others slide.
    Raises:
        UnsupportedError: another kind, or not one for each layer.
    """
    if full_every is not None and config.get("layer_types") is None:
        numbers = range(1, config.num_hidden_layers + 1)
        return ["sliding_attention" if number % full_every else "full_attention" for number in numbers]
    types = list(config.layer_types)
    unknown = set(types) - set(allowed)
    if unknown or len(types) != config.num_hidden_layers:
        raise UnsupportedError(
            f"config.json: layer_types: {sorted(unknown) or len(types)} does not fit; it needs "
            f"{config.num_hidden_layers} of {', '.join(repr(name) for name in allowed)}"
        )
    return types


def layer_windows(config: HFConfig) -> list[int | None]:
    """The sliding window of each layer, None where it sees all; `layer_types` wins over the older keys."""
    window = config.get("sliding_window")
    if config.get("layer_types") is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in layer_types(config)]


def context_length(values: Mapping[str, Any]) -> int | None:
    """The positions that a config.json's model has, under whichever name; None where it does not say."""
    for config in (HFConfig(values), HFConfig(values.get("text_config") or {})):
        for name in ("max_position_embeddings", "n_positions"):
            if config.get(name):
                return config.reach(int(config.get(name)))
    return None
