"""Where a parameter lies in a checkpoint: under its own name, or in pieces, or under another prefix.

Most parameters are stored as they are. Experts are one tensor in memory and may be a tensor each on disk;
the text part of a larger model stands there under a longer name. Reading, writing and `state_dict` go
through the one list that `stored_pieces` makes, so that each is the inverse of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from torchtune.distributed.part import Part, parts

Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class Piece:
    """A stored tensor that is a part of a parameter.

    Attributes:
        name: the tensor's name in the checkpoint.
        index: which part; `()` is all of it.
    """

    name: str
    index: Index = ()

    def region(self, whole: Sequence[int]) -> Part:
        """What it is of a parameter of the shape `whole`; where it has a dim less, that is one long here."""
        index = (*self.index, *[slice(None)] * (len(whole) - len(self.index)))
        ranges = [
            (chosen, chosen + 1) if isinstance(chosen, int) else chosen.indices(size)[:2]
            for chosen, size in zip(index, whole, strict=True)
        ]
        return Part(tuple(whole), tuple((of_dim,) for of_dim in ranges))

    def stored(self, part: Part) -> Part:
        """A part of the region as one of the stored tensor: without the dims that it has not."""
        kept = [dim for dim in range(len(part.whole)) if dim >= len(self.index) or isinstance(self.index[dim], slice)]
        return Part(tuple(part.whole[dim] for dim in kept), tuple(part.ranges[dim] for dim in kept))


Layout = Callable[[], dict[str, list[Piece]]]


class Stored(nn.Module):
    """A module whose parameters may lie in a checkpoint otherwise than in memory.

    Attributes:
        layouts: the ways in which they may be stored, the usual one first. Each gives the pieces of those
            of its parameters that it stores otherwise, by name; names are relative to the module.
        layout: the one that its checkpoint uses.
    """

    layouts: tuple[Layout, ...]
    layout: Layout


def unstored_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are no part of a checkpoint, by name: those of adapters.

    A module names its own children and parameters of this kind in `unstored`.
    """
    unstored = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in getattr(module, "unstored", ())
    }
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if unstored and not unstored.isdisjoint(accumulate(name.split("."), "{}.{}".format))
    }


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and those buffers that are saved, by name; a tied one once, adapters not."""
    unstored = unstored_parameters(model)
    parameters = {name: parameter for name, parameter in model.named_parameters() if name not in unstored}
    buffers = {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
    return parameters | buffers


def stored_pieces(model: nn.Module) -> dict[str, list[Piece]]:
    """For each parameter and saved buffer, by its name in the model, what it is in the checkpoint."""
    pieces = {name: [Piece(name)] for name in stored_tensors(model)}
    for path, module in model.named_modules():
        if isinstance(module, Stored):
            prefix = f"{path}." if path else ""
            for name, own in module.layout().items():
                pieces[prefix + name] = [Piece(prefix + piece.name, piece.index) for piece in own]
    prefixes: Mapping[str, str] = getattr(model, "stored_prefixes", {})
    if prefixes:
        pieces = {name: [_prefixed(piece, prefixes) for piece in own] for name, own in pieces.items()}
    return pieces


def stored_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of the checkpoint; of those of which this rank holds a part, the whole."""
    held, pieces = parts(model), stored_pieces(model)
    shapes = {}
    for name in stored_tensors(model):
        whole = held[name].whole
        shapes.update({piece.name: piece.stored(piece.region(whole)).shape for piece in pieces[name]})
    return shapes


def fit_layouts(model: nn.Module, names: Collection[str]) -> None:
    """Choose, for the model and each part of it that has a choice, the layout that a checkpoint uses.

    Args:
        names: the checkpoint's tensors.
    """
    choices = getattr(model, "prefix_choices", ())
    if choices:
        model.stored_prefixes = max(choices, key=lambda prefixes: _num_found(_names_under(model, prefixes), names))
    prefixes: Mapping[str, str] = getattr(model, "stored_prefixes", {})
    for path, module in model.named_modules():
        if isinstance(module, Stored):
            module.layout = max(module.layouts, key=lambda layout: _num_found(_names_of(layout, path, prefixes), names))


def as_stored(model: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors by their names in the model as the checkpoint's tensors: views, no copies.

    Args:
        tensors: parameters, gradients or whatever has their shape, by `prefix` and name in the model.
    """
    pieces = stored_pieces(model)
    for name, tensor in tensors.items():
        for piece in pieces.get(name.removeprefix(prefix), [Piece(name.removeprefix(prefix))]):
            yield prefix + piece.name, tensor[piece.index] if piece.index else tensor


def as_in_model(model: nn.Module, stored: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The inverse of `as_stored`: what is in pieces is put together; what is unknown or incomplete stays as it is."""
    found = dict(stored)
    shapes = {name: tensor.shape for name, tensor in stored_tensors(model).items()}
    for name, pieces in stored_pieces(model).items():
        if [prefix + piece.name for piece in pieces] == [prefix + name] or any(
            prefix + piece.name not in stored for piece in pieces
        ):
            continue
        if pieces[0].index == ():
            found[prefix + name] = found.pop(prefix + pieces[0].name)
            continue
        first = stored[prefix + pieces[0].name]
        whole = torch.empty(shapes[name], dtype=first.dtype, device=first.device)
        for piece in pieces:
            whole[piece.index].copy_(found.pop(prefix + piece.name))
        found[prefix + name] = whole
    return found


def _prefixed(piece: Piece, prefixes: Mapping[str, str]) -> Piece:
    for ours, theirs in prefixes.items():
        if piece.name.startswith(ours):
            return Piece(theirs + piece.name.removeprefix(ours), piece.index)
    return piece


def _names_under(model: nn.Module, prefixes: Mapping[str, str]) -> Iterator[str]:
    return (_prefixed(Piece(name), prefixes).name for name in stored_tensors(model))


def _names_of(layout: Layout, path: str, prefixes: Mapping[str, str]) -> Iterator[str]:
    for pieces in layout().values():
        yield from (_prefixed(Piece(f"{path}.{piece.name}" if path else piece.name), prefixes).name for piece in pieces)


def _num_found(wanted: Iterator[str], names: Collection[str]) -> float:
    found = [name in names for name in wanted]
    return sum(found) / len(found) if found else 0.0
