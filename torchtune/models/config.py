"""A checkpoint's config.json, read with the defaults that its family has.

The two spellings of rotary options (`rope_theta` + `rope_scaling`, and `rope_parameters`) become one,
and options that would change the numbers but are not built here are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchtune.errors import CheckpointError, UnsupportedError

_NO_DEFAULT = object()


class HFConfig:
    """The keys of a config.json as attributes.

    Args:
        values: the parsed file.
        defaults: what its family assumes for keys that are absent.
    Raises:
        CheckpointError: on reading a key that is neither there nor has a default.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
        self._values = {**(defaults or {}), **values}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        value = self.get(name, _NO_DEFAULT)
        if value is _NO_DEFAULT:
            raise CheckpointError(f"config.json has no '{name}', which this model needs")
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
        """The rotary options in the newer spelling, with `rope_type` and `rope_theta`."""
        rope = dict(self.get("rope_parameters") or self.get("rope_scaling") or {})
        rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
        rope.setdefault("rope_theta", self.get("rope_theta", 10_000.0))
        for name in ("partial_rotary_factor", "original_max_position_embeddings"):
            if self.get(name) is not None:
                rope.setdefault(name, self.get(name))
        return rope

    def refuse(self, name: str, allowed: tuple[Any, ...]) -> None:
        """Refuse a value of `name` that is not built here.

        Raises:
            UnsupportedError: names the key, its value and what is allowed.
        """
        value = self.get(name, allowed[0])
        if value not in allowed:
            raise UnsupportedError(f"config.json: {name}: {value!r} is not supported; supported: {allowed}")


def layer_windows(config: HFConfig) -> list[int | None]:
    """The sliding window of each layer, None where it sees all; `layer_types` wins over the older keys."""
    types = config.get("layer_types")
    window = config.get("sliding_window")
    num_layers = config.num_hidden_layers
    if types is not None:
        unknown = set(types) - {"full_attention", "sliding_attention"}
        if unknown or len(types) != num_layers:
            raise UnsupportedError(
                f"config.json: layer_types: {sorted(unknown) or len(types)} does not fit; it needs {num_layers} of "
                "'full_attention' and 'sliding_attention'"
            )
        return [window if kind == "sliding_attention" else None for kind in types]
    return [window] * num_layers
