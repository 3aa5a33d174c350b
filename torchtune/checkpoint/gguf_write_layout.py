"""Which tensors a GGUF file of a model has, and what of the model each is made from: gguf_layout.py, the other way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchtune.checkpoint.gguf_layout import GGUFNames, Part
from torchtune.errors import UnsupportedError
from torchtune.models.build import build_model
from torchtune.modules.stored import Index, stored_pieces, stored_tensors


@dataclass(frozen=True)
class Placement:
    """What becomes of a parameter, or of a piece of it.

    Attributes:
        index: the piece; `()` is all.
        parts: the tensors of the file, or their parts, that it is taken apart into.
    """

    index: Index
    parts: tuple[Part, ...]
    take_apart: Callable[[Tensor], tuple[Tensor, ...]]

    def __call__(self, parameter: Tensor) -> Iterator[tuple[Part, Tensor]]:
        """The parts with their values, in the shapes of the file."""
        piece = parameter[self.index] if self.index else parameter
        for part, value in zip(self.parts, self.take_apart(piece), strict=True):
            yield part, _without_ones(value) if part.index is None else value


def place_tensors(
    config: Mapping[str, Any], architecture: str, library: Any
) -> tuple[dict[str, list[Placement]], dict[str, tuple[int, ...]], dict[str, int]]:
    """Of each parameter of a config's model, by its name there, what it becomes.

    Returns:
        The placements; the shape of each tensor of the file, as torch counts it; and how many parts it is written in.
    Raises:
        UnsupportedError: a tensor that files of the architecture don't have; names it.
    """
    with torch.device("meta"):
        model = build_model(config)
    names, pieces = GGUFNames(library, architecture, config), stored_pieces(model)
    placements: dict[str, list[Placement]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    num_parts: dict[str, int] = {}
    for own_name, parameter in stored_tensors(model).items():
        placements[own_name] = []
        for piece in pieces[own_name]:
            origin = names.origin(piece.name)
            if any(part.name.startswith("None.") for part in origin.parts):
                raise UnsupportedError(f"a GGUF file of architecture '{architecture}' has no tensor '{piece.name}'")
            placement = Placement(piece.index, origin.parts, origin.take_apart)
            placements[own_name].append(placement)
            for part, value in placement(parameter.to("meta")):
                count = 1 if part.index is None else part.index + 1
                num_parts[part.name] = max(count, num_parts.get(part.name, 1))
                whole = value.shape if part.index is None else (num_parts[part.name], *value.shape)
                shapes[part.name] = tuple(whole)
    return placements, shapes, num_parts


def _without_ones(value: Tensor) -> Tensor:
    """ggml leaves out leading dimensions of size one."""
    while value.dim() > 1 and value.shape[0] == 1:
        value = value[0]
    return value
