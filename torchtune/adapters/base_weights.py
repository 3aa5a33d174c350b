"""What becomes of each of the base's weights between its file and its place in the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from torchtune.adapters.adapter import Adapter, LowRankUpdate, layer_of
from torchtune.adapters.config import Init
from torchtune.adapters.init import factors
from torchtune.adapters.lora import LoRALinear
from torchtune.distributed.part import Part, part_of, parts, set_held
from torchtune.errors import UnsupportedError
from torchtune.modules.decoder import CausalLM
from torchtune.modules.packed import PackedWeight, dense

Pack = Callable[[Tensor], Tensor]


class BaseWeights:
    """Called with a parameter's name and its value as stored, gives what the model holds.

    In this order: frozen adapters are merged in float32 (float64 before quantisation), PiSSA's part is taken out,
    it is quantised or cast; and what an adapter begins with is made of it. One weight at a time is wider than it
    rests. Where ranks share a weight it is this rank's part, of which the part alone is made; the whole is taken where
    `needs_whole` says so, and cut at the end.

    Args:
        model: with its update layers, that have their memory.
        dtype: what frozen weights rest in; None leaves each in the type that it comes in.
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
        dtype: torch.dtype | None,
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
        self._parts = parts(model)

    def needs_whole(self, name: str) -> bool:
        """Whether the whole of a weight is asked for, of which this rank will hold a part."""
        if self._parts[name].is_whole or name in self._whole:
            return False
        layer = self._layer(name)
        begins = layer is not None and (
            self._fresh in ("pissa", "loftq") or layer.initial is not None or self._begins_magnitude(layer)
        )
        return begins or bool(self._adapters_of(name))

    @torch.no_grad()
    def __call__(self, name: str, weight: Tensor) -> Tensor:
        weight = self.stacked(name, weight)
        if name in self._trained:
            return self._cut(name, self._whole.get(name, weight)).to(weight.device, self._trained_dtype)
        layer = self._layer(name)
        return self._rest(name, weight) if layer is None else self._layer_weight(name, weight, layer)

    def stacked(self, name: str, weight: Tensor) -> Tensor:
        """A stored weight with the frozen adapters merged; in a wide type where there is something to merge."""
        touched = self._adapters_of(name)
        if touched:
            weight = weight.to(torch.float64 if self._packable else torch.promote_types(weight.dtype, torch.float32))
        for adapter in touched:
            weight = adapter.merge_into(name, weight, self._model)
        return weight

    def _layer_weight(self, name: str, weight: Tensor, layer: LoRALinear) -> Tensor:
        wide = torch.promote_types(layer.lora_A.weight.dtype, torch.float32)
        if self._fresh == "pissa":
            layer.initial = _begin_at(layer, weight.to(wide))
        if layer.initial is not None:
            a, b = layer.initial
            taken = LowRankUpdate(a, -b, layer.scale)
            weight = taken.merge_into(weight.to(wide), transposed=layer.transposed)
        packed = None
        if self._packs(name) and (self._fresh == "loftq" or self._begins_magnitude(layer)):
            packed = self._packed(weight)
        if self._fresh == "loftq" and packed is not None:
            _begin_at(layer, weight.to(wide) - packed.dense(wide))
        if self._begins_magnitude(layer):
            # As long as the rows that are computed with: B is zero, and the weight is rounded or quantised.
            held = dense(weight.to(self._dtype or wide) if packed is None else packed, wide)
            lengths = held.square().sum(0 if layer.transposed else 1).sqrt()
            set_held(layer, "lora_magnitude_vector", lengths)
        return self._rest(name, weight, packed)

    def _rest(self, name: str, weight: Tensor, packed: PackedWeight | None = None) -> Tensor:
        """What is held of a frozen weight; `packed`, if it is there, is all of it."""
        part = self._parts[name]
        if weight.shape != part.shape:
            weight, packed = self._cut(name, weight), None
        if not self._packs(name):
            return weight.to(self._dtype or weight.dtype)
        packed = self._packed(weight) if packed is None else packed
        _check_blocks(name, part, packed.block)
        return packed

    def _cut(self, name: str, weight: Tensor) -> Tensor:
        part = self._parts[name]
        return weight if weight.shape == part.shape else part.of(weight).clone(memory_format=torch.contiguous_format)

    def _layer(self, name: str) -> LoRALinear | None:
        """The layer of low rank that the weight of this name is of, if it is of one."""
        layer = self._model.get_submodule(name.rpartition(".")[0])
        return layer if isinstance(layer, LoRALinear) and name.endswith(".weight") else None

    def _begins_magnitude(self, layer: LoRALinear) -> bool:
        return self._fresh is not None and layer.lora_magnitude_vector is not None

    def _adapters_of(self, name: str) -> list[Adapter]:
        layer = layer_of(self._model, name)
        return [adapter for adapter in self._frozen if name in adapter.whole or layer in adapter.updates]

    def _packs(self, name: str) -> bool:
        return self._pack is not None and name in self._packable

    def _packed(self, weight: Tensor) -> PackedWeight:
        assert self._pack is not None
        packed = self._pack(weight)
        assert isinstance(packed, PackedWeight)
        return packed


def _begin_at(layer: LoRALinear, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Set A and B to the best approximation of `matrix`, which lies as the layer's weight does; returns both, whole."""
    rank, *_ = part_of(layer.lora_A, "weight").whole
    found = factors(matrix.T if layer.transposed else matrix, rank, layer.scale)
    a, b = (each.to(layer.lora_A.weight.dtype) for each in found)
    set_held(layer.lora_A, "weight", a)
    set_held(layer.lora_B, "weight", b)
    return a, b


def _check_blocks(name: str, part: Part, block: int) -> None:
    """Refuse a part that cuts blocks of values that share a scale: it would be quantised otherwise than the whole.

    Raises:
        UnsupportedError: names the weight.
    """
    (rows, columns), (of_rows, of_columns) = part.whole[-2:], part.ranges[-2:]
    if of_columns == ((0, columns),):
        cuts, end = [cut * columns for stretch in of_rows for cut in stretch], rows * columns
    else:
        cuts, end = [columns, *(cut for stretch in of_columns for cut in stretch)], 0
    if any(cut % block and cut != end for cut in cuts):
        raise UnsupportedError(
            f"'{name}' {part.whole} can't be quantised in the part that this rank has of it, {part.ranges}: blocks of "
            f"{block} values share a scale, and it cuts some; use a smaller tensor_parallel, or base_quantization=none"
        )
