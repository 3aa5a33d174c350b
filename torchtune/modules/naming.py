"""Names that a checkpoint gives to the parts of a block, where they are not the block's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


class Block(nn.Module):
    """A module whose children can carry a checkpoint's names while the code reads them by the block's.

    GPT-2 calls a layer's attention `attn` and Llama `self_attn`; the layer's forward says `self.self_attn`,
    parameters, adapters and files say `attn`. Whatever replaces the child is found under both names.
    """

    def __getattr__(self, name: str) -> Any:
        # Looked up first, for it is children that a forward asks for, and `nn.Module` looks everywhere else before.
        child = self.__dict__.get("_modules", {}).get(name)
        if child is not None:
            return child
        renamed = self.__dict__.get("_renamed")
        return super().__getattr__(renamed.get(name, name) if renamed else name)


def rename_children(model: nn.Module, names: Mapping[str, str]) -> None:
    """Give the children of all blocks in `model` a checkpoint's names.

    Args:
        names: the checkpoint's name for each name of ours, without a path: `{"self_attn": "attn"}`.
    """
    for module in model.modules():
        renamed = {ours: theirs for ours, theirs in names.items() if ours in module._modules}
        if renamed and isinstance(module, Block):
            module._modules = {renamed.get(name, name): child for name, child in module._modules.items()}
            module.__dict__["_renamed"] = {**module.__dict__.get("_renamed", {}), **renamed}
