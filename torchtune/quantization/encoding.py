"""Which layers of a model a scheme quantises, and whether what is written of them can be read by others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchtune.errors import ConfigError, Problems, UnsupportedError
from torchtune.modules.decoder import CausalLM
from torchtune.modules.moe import Experts
from torchtune.modules.stored import stored_pieces, stored_tensors
from torchtune.quantization.kinds import packable
from torchtune.quantization.schemes import Described, Scheme

# Layers that are named where a group size doesn't fit.
SHOWN = 4


@dataclass(frozen=True)
class Encoding:
    """What of a checkpoint's tensors is written otherwise.

    Attributes:
        scheme: how.
        names: the tensors that are, by their names in the checkpoint.
        dense_layers: linear layers that are not, by their names there.
    """

    scheme: Scheme
    names: frozenset[str]
    dense_layers: tuple[str, ...]

    def described(self, name: str, shape: tuple[int, ...]) -> dict[str, Described]:
        """What tensor `name` becomes: shape and type of each, by its name in the file."""
        return {layer_of(name) + part: said for part, said in self.scheme.described(shape).items()}

    def encode(self, name: str, matrix: Tensor) -> dict[str, Tensor]:
        """The tensors that `described` names."""
        return {layer_of(name) + part: tensor for part, tensor in self.scheme.encode(matrix).items()}

    def config(self, compute_dtype: torch.dtype) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        return self.scheme.config(self.dense_layers, compute_dtype)


def layer_of(name: str) -> str:
    """What stands before "weight" in a tensor's name."""
    return name.removesuffix("weight")


def quantised_layers(model: CausalLM, scheme: Scheme, *, head: bool = False) -> dict[str, nn.Module]:
    """The linear layers that a scheme quantises, by name: those of the decoder's layers, and the head if asked for.

    The model may be on the meta device.

    Raises:
        UnsupportedError: the model has layers that `transformers` could not read back.
        ConfigError: groups that don't divide a layer's rows, or a head that is the embedding.
    """
    modules = dict(model.named_modules())
    why = _why_not_written(model, modules)
    if why is not None:
        raise UnsupportedError(f"this model can't be quantised to a folder that transformers reads: {why}")
    layers = {name.removesuffix(".weight"): modules[name.removesuffix(".weight")] for name in packable(model)}
    if head:
        if model.is_tied:
            raise ConfigError("the head is the embedding, which stays dense; leave it out", key="quantize_head")
        found = {name: module for name, module in modules.items() if name in ("lm_head", "embed_out")}
        layers |= found
    refused = {name: scheme.why_not((layer.out_features, layer.in_features)) for name, layer in layers.items()}
    problems, named = Problems(), [f"{name} {why}" for name, why in refused.items() if why]
    for text in named[:SHOWN]:
        problems.add("group_size", text)
    if named:
        more = f"{len(named) - SHOWN} more layers too; " if len(named) > SHOWN else ""
        problems.add("group_size", more + _groups_that_fit(layers))
    problems.raise_all()
    return layers


def encoding_of(model: CausalLM, scheme: Scheme, *, head: bool = False) -> Encoding:
    """What of a model's checkpoint a scheme writes otherwise. The model may be on the meta device.

    Raises:
        UnsupportedError, ConfigError: as `quantised_layers`.
    """
    layers, pieces = quantised_layers(model, scheme, head=head), stored_pieces(model)
    names = {piece.name for layer in layers for piece in pieces[f"{layer}.weight"]}
    linear = {f"{name}.weight" for name, module in model.named_modules() if getattr(module, "is_linear", False)}
    held = stored_tensors(model)
    dense = {piece.name for name in linear if name in held for piece in pieces[name]} - names
    # A tied head owns no tensor, and is a layer for those who read it.
    heads = set() if head else {"lm_head"}
    return Encoding(scheme, frozenset(names), tuple(sorted({layer_of(name).rstrip(".") for name in dense} | heads)))


def _why_not_written(model: CausalLM, modules: Mapping[str, nn.Module]) -> str | None:
    if any(isinstance(module, Experts) for module in modules.values()):
        return "it has experts, which are stacks of matrices there and no linear layers"
    if any(getattr(module, "transposed", False) for module in modules.values()):
        return "its matrices lie the other way round (GPT-2's Conv1D)"
    if getattr(model, "stored_prefixes", {}) or model.carried:
        return "it is a part of a larger model, whose other layers would be taken for quantised ones"
    return None


def _groups_that_fit(layers: Mapping[str, nn.Module]) -> str:
    """What to do where a group size does not fit."""
    sizes = {int(layer.in_features) for layer in layers.values()}  # type: ignore[arg-type]  # all linear ones have them
    fit = [size for size in (128, 64, 32, 16, 8) if all(columns % size == 0 for columns in sizes)]
    return f"group_size={fit[0]} divides all" if fit else "no group size that is in use divides all; use int8"
