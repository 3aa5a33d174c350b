"""What becomes of each of the base's weights between its file and its place in the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from torchtune.adapters.adapter import Adapter, LowRankUpdate, layer_of
from torchtune.adapters.config import Init
from torchtune.adapters.init import factors
from torchtune.adapters.lora import LoRALinear
from torchtune.modules.decoder import CausalLM
from torchtune.modules.packed import PackedWeight

Pack = Callable[[Tensor], Tensor]


class BaseWeights:
    """Called with a parameter's name and its value as stored, gives what the model holds.

    In this order: frozen adapters are merged in float32 (float64 before quantisation), PiSSA's part is taken out,
    it is quantised or cast. One weight at a time is wider than it rests.

    Args:
        model: with its update layers, that have their memory.
        dtype: what frozen weights rest in.
        trained_dtype: what weights that are trained whole are held in.
        frozen: adapters that the run stands on, in order.
        pack: quantises a weight; None leaves all dense.
        packable: names of the parameters to quantise.
        whole: values of weights that are trained whole, where a file has them already.
        fresh: how A and B begin; None where they were filled from a file.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        dtype: torch.dtype,
        trained_dtype: torch.dtype,
        frozen: Sequence[Adapter] = (),
        pack: Pack | None = None,
        packable: Collection[str] = (),
        whole: Mapping[str, Tensor] | None = None,
        fresh: Init | None = None,
    ) -> None:
        self._model, self._frozen = model, tuple(frozen)
        self._dtype, self._trained_dtype = dtype, trained_dtype
        self._pack, self._packable = pack, frozenset(packable)
        self._whole, self._fresh = whole or {}, fresh
        self._trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    @torch.no_grad()
    def __call__(self, name: str, weight: Tensor) -> Tensor:
        weight = self.stacked(name, weight)
        if name in self._trained:
            return self._whole.get(name, weight).to(weight.device, self._trained_dtype)
        packs = self._pack is not None and name in self._packable
        layer = self._model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, LoRALinear) and name.endswith(".weight"):
            return self._layer_weight(weight, layer, packs)
        return self._packed(weight) if packs else weight.to(self._dtype)

    def stacked(self, name: str, weight: Tensor) -> Tensor:
        """A stored weight with the frozen adapters merged; in a wide type where there is something to merge."""
        touched = [a for a in self._frozen if name in a.whole or layer_of(self._model, name) in a.updates]
        if touched:
            weight = weight.to(torch.float64 if self._packable else torch.promote_types(weight.dtype, torch.float32))
        for adapter in touched:
            weight = adapter.merge_into(name, weight, self._model)
        return weight

    def _layer_weight(self, weight: Tensor, layer: LoRALinear, packs: bool) -> Tensor:
        wide = torch.promote_types(layer.lora_A.weight.dtype, torch.float32)
        if self._fresh == "pissa":
            _begin_at(layer, weight.to(wide))
            layer.initial = layer.lora_A.weight.clone(), layer.lora_B.weight.clone()
        if layer.initial is not None:
            a, b = layer.initial
            taken = LowRankUpdate(a, -b, layer.scale)
            weight = taken.merge_into(weight.to(wide), transposed=layer.transposed)
        if not packs:
            return weight.to(self._dtype)
        packed = self._packed(weight)
        if self._fresh == "loftq":
            _begin_at(layer, weight.to(wide) - packed.dense(wide))
        return packed

    def _packed(self, weight: Tensor) -> PackedWeight:
        assert self._pack is not None
        packed = self._pack(weight)
        assert isinstance(packed, PackedWeight)
        return packed


def _begin_at(layer: LoRALinear, matrix: Tensor) -> None:
    """Set A and B to the best approximation of `matrix`, which lies as the layer's weight does."""
    a, b = factors(matrix.T if layer.transposed else matrix, len(layer.lora_A.weight), layer.scale)
    layer.lora_A.weight.copy_(a)
    layer.lora_B.weight.copy_(b)
