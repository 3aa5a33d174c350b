"""The base with its adapters in it, one weight at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchtune.adapters.adapter import LowRankUpdate, adapter_of, layer_of, lies_transposed
from torchtune.adapters.base_weights import BaseWeights
from torchtune.adapters.config import LoRAConfig
from torchtune.adapters.lora import LoRALinear
from torchtune.modules.decoder import CausalLM
from torchtune.modules.packed import PackedWeight, dense


class MergedWeights:
    """Called with a parameter's name, gives it with all updates in it, for `save_model`.

    Where the base rests dense its stored value is read again, not what the run rounded it to; where it is
    quantised the update goes to what was trained on, the dequantised weight. The sum is taken in float32
    (float64 over a quantised base) and cast once, by the caller.

    Args:
        base: what the run made its base by.
        read: a parameter's stored value, by its name.
    """

    def __init__(self, model: CausalLM, config: LoRAConfig, base: BaseWeights, read: Callable[[str], Tensor]) -> None:
        self._model, self._base, self._read = model, base, read
        self._updates = adapter_of(model, config).updates

    @torch.no_grad()
    def __call__(self, name: str, held: Tensor) -> Tensor:
        """held: what the model has under this name."""
        if not isinstance(held, torch.nn.Parameter) or held.requires_grad:
            return held.detach()
        if isinstance(held, PackedWeight):
            weight, update = _unpacked(held), self._on_quantised(name)
        else:
            weight, update = self._base.stacked(name, self._read(name)), self._updates.get(layer_of(self._model, name))
        if update is None:
            return weight
        weight = weight.to(device=update.a.device, dtype=torch.promote_types(weight.dtype, torch.float32))
        return update.merge_into(weight, transposed=lies_transposed(self._model, name))

    def _on_quantised(self, name: str) -> LowRankUpdate | None:
        """The update as it is trained: PiSSA's part has been taken out of what was quantised."""
        path = layer_of(self._model, name)
        update = self._updates.get(path)
        layer = None if update is None or path == name else self._model.get_submodule(path)  # its own name: experts'
        if not isinstance(layer, LoRALinear):
            return update
        return LowRankUpdate(layer.lora_A.weight, layer.lora_B.weight, layer.scale, layer.lora_magnitude_vector)


def _unpacked(weight: PackedWeight) -> Tensor:
    """A matrix, or a stack of them, in float64."""
    if weight.dim() == 2:
        return weight.dense(torch.float64)
    return torch.stack([dense(weight[index], torch.float64) for index in range(len(weight))])
