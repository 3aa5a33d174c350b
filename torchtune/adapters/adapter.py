"""An adapter by itself: its matrices by the names of the layers that they belong to, apart from any model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from torchtune.adapters.config import Init, LoRAConfig
from torchtune.adapters.lora import ExpertsUpdate, LoRAEmbedding, LoRALinear, RouterUpdate
from torchtune.adapters.low_rank import with_update
from torchtune.distributed.part import part_of, set_held
from torchtune.errors import CheckpointError
from torchtune.modules.decoder import CausalLM
from torchtune.modules.linear import Conv1D, Embedding
from torchtune.modules.moe import Experts
from torchtune.modules.stored import stored_tensors, unstored_parameters


@dataclass(frozen=True)
class LowRankUpdate:
    """The update of one matrix W [out, in]: scale * B A, and DoRA's magnitude.

    Attributes:
        a: [r, in], or [E, r, in] of a stack of experts.
        b: [out, r], or [E, out, r].
        magnitude: [out], the lengths of the rows of what is merged.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[-2]

    def merge_into(self, weight: Tensor, *, transposed: bool = False) -> Tensor:
        """`weight` with the update, in `weight`'s type, which should be a wide one.

        Args:
            weight: [out, in] or [E, out, in]; in and out the other way round where `transposed`.
        """
        merged = with_update(weight.mT if transposed else weight, self.a, self.b, self.scale)
        if self.magnitude is not None:
            merged = merged * (self.magnitude.to(weight) / merged.norm(dim=-1))[..., None]
        return merged.mT if transposed else merged


@dataclass
class Adapter:
    """A trained adapter.

    Attributes:
        config: its rank, alpha and so on; `targets` are the exact names in `updates`.
        updates: by the name of the layer in the model, or of a stack of experts (`PATH.down_proj`).
        whole: parameters that were trained whole, by name in the model, and the buffers of their modules.
        base: the checkpoint that it belongs to, as it was named; None if that is not known.
    """

    config: LoRAConfig
    updates: dict[str, LowRankUpdate]
    whole: dict[str, Tensor] = field(default_factory=dict)
    base: str | None = None

    def merge_into(self, name: str, weight: Tensor, model: CausalLM) -> Tensor:
        """A parameter of the base, by its name in the model, with what the adapter has for it."""
        if name in self.whole:
            return self.whole[name].to(weight)
        update = self.updates.get(layer_of(model, name))
        return weight if update is None else update.merge_into(weight, transposed=lies_transposed(model, name))


def layer_of(model: CausalLM, parameter: str) -> str:
    """The name under which the parameter's update is kept: its layer's, or its own in a stack of experts."""
    path, _, name = parameter.rpartition(".")
    return path if name == "weight" else "" if name == "bias" else parameter


def lies_transposed(model: CausalLM, parameter: str) -> bool:
    """Whether a parameter is [in, out]: GPT-2's, an embedding's, the experts' of some families."""
    module = model.get_submodule(parameter.rpartition(".")[0])
    if isinstance(module, Experts | LoRALinear):
        return module.transposed
    return isinstance(module, Embedding | LoRAEmbedding | Conv1D)


@dataclass(frozen=True)
class _Factors:
    """The names of an update's parameters in the model; `initial` as `LoRALinear` has it."""

    a: str
    b: str
    scale: float
    magnitude: str | None = None
    initial: tuple[Tensor, Tensor] | None = None


def _updates_in(model: CausalLM) -> dict[str, _Factors]:
    """The updates of a model's layers, by their names in an adapter."""
    found: dict[str, _Factors] = {}
    for name, module in model.named_modules():
        pair = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        if isinstance(module, LoRALinear):
            magnitude = None if module.lora_magnitude_vector is None else f"{name}.lora_magnitude_vector"
            found[name] = _Factors(*pair, module.scale, magnitude, module.initial)
        elif isinstance(module, LoRAEmbedding):
            found[name] = _Factors(f"{name}.lora_embedding_A", f"{name}.lora_embedding_B", module.scale)
        elif isinstance(module, RouterUpdate):
            found[name.removesuffix(".update")] = _Factors(*pair, module.scale)
        elif isinstance(module, ExpertsUpdate):
            found[name.replace(".updates.", ".")] = _Factors(*pair, module.scale)
    return found


def adapter_of(
    model: CausalLM,
    config: LoRAConfig,
    *,
    base: str | None = None,
    values: Mapping[str, Tensor] | None = None,
    with_initial: bool = True,
) -> Adapter:
    """What `model`'s update layers hold now; the tensors are the model's own.

    PiSSA trains the difference to where it began, which is of twice the rank: that is what stands here, so that
    it belongs to the base as it was published.

    Args:
        with_initial: false for what PiSSA trains by itself, which belongs to the base less the beginning.
        values: in place of the model's, the whole of what is trained by name, where a rank holds parts alone.
    """
    values = dict(model.named_parameters()) if values is None else values
    updates = dict[str, LowRankUpdate]()
    for name, names in _updates_in(model).items():
        a, b = values[names.a], values[names.b]
        if names.initial is not None and with_initial:
            a, b = torch.cat((a, names.initial[0].to(a))), torch.cat((b, -names.initial[1].to(b)), dim=1)
        updates[name] = LowRankUpdate(a, b, names.scale, None if names.magnitude is None else values[names.magnitude])
    own = unstored_parameters(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad and name not in own]
    whole = {name: values[name].detach() for name in trained}
    parents = {name.rpartition(".")[0] for name in whole}
    for name, tensor in stored_tensors(model).items():  # a router's correction: PEFT has a module's buffers with it
        if not isinstance(tensor, nn.Parameter) and name.rpartition(".")[0] in parents:
            whole[name] = tensor
    return Adapter(replace(config, targets=tuple(updates)), updates, whole, base)


def fill(model: CausalLM, adapter: Adapter, *, init: Init = "default") -> None:
    """Give the update layers of `model`, on the device where they are, an adapter's values.

    What it trains whole is compared, and set where the base's weights are read (`BaseWeights`).

    Args:
        init: with `pissa` the adapter holds, beside the trained matrices, those that the run began with.
    Raises:
        CheckpointError: a layer without a value, a value without a layer, or other shapes.
    """
    into = _updates_in(model)
    _compare(into, adapter.updates, "no update of", "an update of")
    _compare(adapter_of(model, adapter.config).whole, adapter.whole, "nothing of", "a value of")
    for name, names in into.items():
        value = adapter.updates[name]
        a, b = value.a, value.b
        if init == "pissa":
            layer = model.get_submodule(name)
            assert isinstance(layer, LoRALinear)
            (a, b), (a_before, b_before) = _pissa_halves(a, b)
            device, dtype = layer.lora_A.weight.device, layer.lora_A.weight.dtype
            layer.initial = a_before.to(device, dtype), b_before.to(device, dtype)
        if (names.magnitude is None) != (value.magnitude is None):
            raise CheckpointError(f"'{name}' has a magnitude (DoRA) in one of adapter and run, and not in the other")
        _set(model, name, names.a, a)
        _set(model, name, names.b, b)
        if names.magnitude is not None and value.magnitude is not None:
            _set(model, name, names.magnitude, value.magnitude)


def split_pissa(model: CausalLM) -> None:
    """Make of layers that hold a PiSSA adapter, as a file has it, those of the run that trained it.

    Half of it is what was trained, the other half what the run had taken out of the base.
    """
    for module in model.modules():
        if isinstance(module, LoRALinear):
            (a, b), module.initial = _pissa_halves(module.lora_A.weight.detach(), module.lora_B.weight.detach())
            module.lora_A.weight, module.lora_B.weight = nn.Parameter(a), nn.Parameter(b)


def _pissa_halves(a: Tensor, b: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Of a saved PiSSA adapter, A and B as trained, and as they began: `adapter_of` has put them together."""
    (a, a_before), (b, b_before) = a.chunk(2), b.chunk(2, dim=1)
    return (a, b), (a_before, -b_before)


def _compare(held: Mapping[str, object], given: Mapping[str, object], no: str, an: str) -> None:
    if missing := sorted(set(held) - set(given)):
        raise CheckpointError(f"the adapter has {no} '{missing[0]}', which this run trains")
    if left_over := sorted(set(given) - set(held)):
        raise CheckpointError(f"the adapter has {an} '{left_over[0]}', which this run does not train")


def _set(model: CausalLM, layer: str, name: str, value: Tensor) -> None:
    """Give a parameter of a layer's update its values."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if (shape := part_of(module, attribute).whole) != value.shape:
        raise CheckpointError(
            f"the adapter's '{layer}' is {tuple(value.shape)}, and this run's {tuple(shape)}: another rank, or another "
            "base"
        )
    set_held(module, attribute, value)
