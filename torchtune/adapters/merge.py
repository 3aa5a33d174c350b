"""The base with its adapters in it, one weight at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from torchtune.adapters.adapter import adapter_of, layer_of, lies_transposed
from torchtune.adapters.base_weights import BaseWeights
from torchtune.adapters.config import LoRAConfig
from torchtune.distributed.part import local
from torchtune.modules.decoder import CausalLM
from torchtune.modules.packed import PackedWeight, unpacked


class MergedWeights:
    """Called with a parameter's name, gives it with all updates in it, for `save_model`.

    Where the base rests dense its stored value is read again, not what the run rounded it to; where it is
    quantised the update goes to what was trained on, the dequantised weight. The sum is taken in float32
    (float64 over a quantised base) and cast once, by the caller.

    Args:
        base: what the run made its base by.
        read: a parameter's stored value, whole, by its name.
        values: the whole of A, B and magnitudes by name; by default the model's own.
    """

    def __init__(
        self,
        model: CausalLM,
        config: LoRAConfig,
        base: BaseWeights,
        read: Callable[[str], Tensor],
        *,
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._model, self._base, self._read = model, base, read
        self._updates = adapter_of(model, config, values=values).updates
        self._as_trained = adapter_of(model, config, values=values, with_initial=False).updates
        self._frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}

    def needs_held(self, name: str) -> bool:
        """Whether what the model holds under a name is asked for, and not what its base has there."""
        return name not in self._frozen or self._is_packed(name)

    @torch.no_grad()
    def __call__(self, name: str, held: Tensor) -> Tensor:
        """held: what the model has under this name; of a packed weight the dense values will do."""
        if name not in self._frozen:
            return held.detach()
        layer = layer_of(self._model, name)
        if isinstance(held, PackedWeight) or self._is_packed(name):
            weight = unpacked(held, torch.float64) if isinstance(held, PackedWeight) else held.double()
            update = self._as_trained.get(layer)  # what PiSSA trains stands beside what is quantised
        else:
            weight, update = self._base.stacked(name, self._read(name)), self._updates.get(layer)
        if update is None:
            return weight
        weight = weight.to(device=update.a.device, dtype=torch.promote_types(weight.dtype, torch.float32))
        return update.merge_into(weight, transposed=lies_transposed(self._model, name))

    def _is_packed(self, name: str) -> bool:
        return isinstance(local(self._frozen[name]), PackedWeight)
