"""Layers with a low-rank update, and the transform that gives it to a model.

A layer keeps its `weight` and `bias` under their names, frozen, and gets `lora_A` and `lora_B` (and DoRA's
`lora_magnitude_vector`) beside them: names are PEFT's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtune.adapters.config import LoRAConfig
from torchtune.adapters.fused import lora_linear, lora_linear_of_silu_product, lora_linears
from torchtune.adapters.low_rank import Adapted, with_update
from torchtune.adapters.targets import Targets, find_targets, find_whole
from torchtune.distributed.collectives import sum_both_ways
from torchtune.distributed.mesh import Axis
from torchtune.errors import Problems, did_you_mean
from torchtune.modules.decoder import CausalLM
from torchtune.modules.grouped import grouped_linear
from torchtune.modules.linear import Conv1D, Embedding, Linear, share_of
from torchtune.modules.moe import Experts, Router
from torchtune.modules.packed import dense


class Factor(nn.Module):
    """One of the two matrices of a low-rank update."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))


class LoRALinear(nn.Module):
    """A linear layer with a low-rank update: x W^T + b + scale * (x A^T) B^T.

    Letters: r rank. W is [out, in], or lies as [in, out] where `transposed` (GPT-2); A is [r, in], B [out, r].

    Args:
        layer: whose weight and bias it takes over.
        scale: what the update is multiplied by.
        dropout: share of the update's inputs dropped in training.
        use_dora: rows of W + scale * B A are scaled to the length that `lora_magnitude_vector` [out] says.

    Attributes:
        rounding: makes of W + scale * B A what is computed with in its place, in a type; gradients go straight through.
        initial: A and B at the beginning, where their product was taken out of W (PiSSA).
        bias_share: as of `Linear`.
        input_axis: ranks that each have some of the inputs, and the columns of W and A for them.
    """

    is_linear = True
    unstored = ("lora_A", "lora_B", "lora_magnitude_vector")

    def __init__(
        self, layer: Linear | Conv1D, *, rank: int, scale: float, dropout: float = 0.0, use_dora: bool = False
    ) -> None:
        super().__init__()
        self.transposed, self.bias_share, self.input_axis = layer.transposed, layer.bias_share, Axis()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight: Tensor = layer.weight
        self.bias: Tensor | None = layer.bias
        self.scale = scale
        with torch.device(self.weight.device):
            self.lora_A, self.lora_B = Factor(rank, self.in_features), Factor(self.out_features, rank)
            self.lora_magnitude_vector = nn.Parameter(torch.empty(self.out_features)) if use_dora else None
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.rounding: Callable[[Tensor, torch.dtype], Tensor] | None = None
        self.initial: tuple[Tensor, Tensor] | None = None
        self._squared_norms: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        adapter_input = self.dropout(x) if self.dropout is not None and self.training else None
        adapted, stretch = self._adapted(x.dtype), self._stretch()
        transposed, is_sum = adapted.transposed, adapted.is_sum
        out = lora_linear(x, *adapted[:5], transposed=transposed, is_sum=is_sum, adapter_input=adapter_input)
        return self._stretched(out, stretch)

    @staticmethod
    def together(layers: Sequence[LoRALinear], x: Tensor) -> Sequence[Tensor]:
        """The outputs of several layers for the same x."""
        if any(layer.dropout is not None and layer.training for layer in layers):
            return [layer(x) for layer in layers]  # each drops other inputs
        stretches = [layer._stretch() for layer in layers]
        outputs = lora_linears(x, [layer._adapted(x.dtype) for layer in layers])
        return [layer._stretched(out, s) for layer, out, s in zip(layers, outputs, stretches, strict=True)]

    def of_silu_product(self, gate: Tensor, up: Tensor) -> Tensor:
        """The output for silu(gate) * up, which is not kept."""
        if self.transposed or self.rounding is not None or (self.dropout is not None and self.training):
            return self(F.silu(gate) * up)
        adapted, stretch = self._adapted(gate.dtype), self._stretch()
        out = lora_linear_of_silu_product(
            gate, up, adapted.weight, adapted.bias, adapted.lora_a, adapted.lora_b, adapted.scale
        )
        return self._stretched(out, stretch)

    def low_rank(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """For a head: u [..., r] and B [out, r] in x's type, where the update of the output is u B^T."""
        x = x if self.dropout is None else self.dropout(x)
        return F.linear(x, self.lora_A.weight.to(x.dtype)), (self.lora_B.weight * self.scale).to(x.dtype)

    def row_norms(self) -> Tensor:
        """[out], the lengths of the rows of W + scale * B A, without making that matrix. No gradient goes through.

        |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b. The paper treats the length as a constant (section 4.3).
        """
        wide = torch.promote_types(self.lora_A.weight.dtype, torch.float32)
        with torch.no_grad():
            w = dense(self.weight, wide)
            w = w.T if self.transposed else w
            if torch.compiler.is_compiling():
                own = w.square().sum(1)  # what only the first call does would be another graph when it is recomputed
            else:
                own = self._squared_norms = w.square().sum(1) if self._squared_norms is None else self._squared_norms
            a, b = self.lora_A.weight.to(wide), self.lora_B.weight.to(wide) * self.scale
            cross = ((w @ a.T) * b).sum(1)
            squares = own + 2 * cross + ((b @ (a @ a.T)) * b).sum(1)
            return sum_both_ways(squares, self.input_axis).clamp_min(0).sqrt()

    def forget_norms(self) -> None:
        """Measure W anew: it is another one."""
        self._squared_norms = None

    def _adapted(self, dtype: torch.dtype) -> Adapted:
        """What is computed in `dtype`."""
        bias = None if self.lora_magnitude_vector is not None else share_of(self.bias, self.bias_share)
        a, b = self.lora_A.weight, self.lora_B.weight
        if self.rounding is None:
            return Adapted(self.weight, bias, a, b, self.scale, self.transposed)
        with torch.no_grad():
            # As it is merged and written, to the bit.
            wide = torch.promote_types(a.dtype, torch.float32)
            rounded = self.rounding(with_update(dense(self.weight, wide), a, b, self.scale), dtype)
        return Adapted(rounded, bias, a, b, self.scale, is_sum=True)

    def _stretch(self) -> Tensor | None:
        """[out], DoRA's magnitude over the length that each row has.

        Made before the fused update: torch.compile would else take the scale, which both use, out of the update's own
        graph, where it can't be had from.
        """
        return None if self.lora_magnitude_vector is None else self.lora_magnitude_vector / self.row_norms()

    def _stretched(self, out: Tensor, stretch: Tensor | None) -> Tensor:
        if stretch is None:
            return out
        out = out * stretch.to(out.dtype)
        bias = share_of(self.bias, self.bias_share)
        return out if bias is None else out + bias.to(out.dtype)


class LoRAEmbedding(nn.Module):
    """An embedding with a low-rank update: W[id] + scale * A[:, id]^T B^T; A is [r, V], B [D, r]."""

    unstored = ("lora_embedding_A", "lora_embedding_B")

    def __init__(self, layer: Embedding, *, rank: int, scale: float) -> None:
        super().__init__()
        self.weight = layer.weight
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim
        self.scale = scale
        with torch.device(self.weight.device):
            self.lora_embedding_A = nn.Parameter(torch.empty(rank, self.num_embeddings))
            self.lora_embedding_B = nn.Parameter(torch.empty(self.embedding_dim, rank))

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [...] -> [..., D]."""
        rows = F.embedding(input_ids, self.lora_embedding_A.T) @ self.lora_embedding_B.T * self.scale
        return F.embedding(input_ids, self.weight) + rows.to(self.weight.dtype)


class RouterUpdate(nn.Module):
    """The low-rank update of a router's logits: A is [r, D], B [E, r]."""

    def __init__(self, in_features: int, out_features: int, *, rank: int, scale: float) -> None:
        super().__init__()
        self.lora_A, self.lora_B = Factor(rank, in_features), Factor(out_features, rank)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, E]."""
        return F.linear(F.linear(x, self.lora_A.weight.to(x.dtype)), self.lora_B.weight.to(x.dtype)) * self.scale


class ExpertsUpdate(nn.Module):
    """The low-rank update of one projection of all experts: A is [E, r, in], B [E, out, r]."""

    def __init__(self, num_experts: int, in_features: int, out_features: int, *, rank: int, scale: float) -> None:
        super().__init__()
        self.lora_A, self.lora_B = Factor(num_experts, rank, in_features), Factor(num_experts, out_features, rank)
        self.scale = scale

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [T, in], rows by expert as `counts` [E] says -> [T, out]."""
        low = grouped_linear(x, self.lora_A.weight, counts) * self.scale
        return grouped_linear(low, self.lora_B.weight, counts)


def apply_lora(model: CausalLM, config: LoRAConfig, *, is_given: bool = False) -> Targets:
    """Freeze `model` and give the layers that `config` names a trainable low-rank update.

    The model may be on the meta device. The update's values are set afterwards, by `init_lora` or from a file.

    Args:
        is_given: it is the config of an adapter that exists, so its ranks are what they are: others let them be
            above a matrix, and what PiSSA has trained is of twice its rank.
    Returns:
        What was adapted.
    Raises:
        ConfigError: targets that name nothing, a rank above a matrix, or what does not go together; all at once.
    """
    problems = Problems()
    targets = find_targets(model, config.targets, layers=config.layers, problems=problems)
    all_found, whole = not problems, list[str]()
    with problems.caught():
        whole = find_whole(model, config.modules_to_save)
    with problems.caught():  # a pattern that can't be compiled
        if not is_given:
            _check_ranks(model, config, targets, problems)
        _check(model, config, targets, whole, problems)
        if all_found and targets.names:
            _check_patterns(config, targets, problems)
    if not config.targets and not config.modules_to_save:
        problems.add("lora_targets", "names no layer, and modules_to_save no module: nothing would be trained")
    problems.raise_all()
    model.requires_grad_(False)
    for name in targets.linears:
        layer = model.get_submodule(name)
        assert isinstance(layer, Linear | Conv1D)
        rank, scale = config.rank_of(name), config.scale_of(name)
        made = LoRALinear(layer, rank=rank, scale=scale, dropout=config.dropout, use_dora=config.use_dora)
        model.set_submodule(name, made)
    for name in targets.embeddings:
        embedding = model.get_submodule(name)
        assert isinstance(embedding, Embedding)
        model.set_submodule(name, LoRAEmbedding(embedding, rank=config.rank_of(name), scale=config.scale_of(name)))
    for name in targets.experts:
        path, _, kind = name.rpartition(".")
        _adapt_experts(model.get_submodule(path), kind, rank=config.rank_of(name), scale=config.scale_of(name))
    for name in targets.routers:
        router = model.get_submodule(name)
        assert isinstance(router, Router)
        with torch.device(router.weight.device):
            router.update = RouterUpdate(*_sizes(model, name), rank=config.rank_of(name), scale=config.scale_of(name))
    for name in whole:
        model.get_submodule(name).requires_grad_(True)
    return targets


def _adapt_experts(experts: nn.Module, kind: str, *, rank: int, scale: float) -> None:
    assert isinstance(experts, Experts)
    in_features, out_features = experts.sizes_of(kind)
    with torch.device(experts.down_proj.device):
        update = ExpertsUpdate(experts.num_experts, in_features, out_features, rank=rank, scale=scale)
    experts.updates[kind] = update


def _check_ranks(model: CausalLM, config: LoRAConfig, targets: Targets, problems: Problems) -> None:
    too_small = [name for name in targets.names if not 1 <= config.rank_of(name) <= min(_sizes(model, name))]
    for name in too_small[:1]:
        num_in, num_out = _sizes(model, name)
        problems.add(
            "lora_rank",
            f"rank {config.rank_of(name)} does not fit '{name}': its matrix is {num_out} x {num_in}; give it at most "
            f"{min(num_in, num_out)}, by lora_rank_pattern for this layer alone",
        )


def _check(model: CausalLM, config: LoRAConfig, targets: Targets, whole: Sequence[str], problems: Problems) -> None:
    """What does not go together; one of each kind is told."""
    inside = [(name, module) for name in targets.names for module in whole if f"{name}.".startswith(f"{module}.")]
    for name, module in inside[:1]:
        problems.add("modules_to_save", f"'{module}' is trained whole, so '{name}' takes no adapter too")
    kinds = {"experts": targets.experts, "routers": targets.routers, "the embedding": targets.embeddings}
    without = next((kind for kind, names in kinds.items() if names), None)
    for key, given in (("lora_dropout", config.dropout > 0), ("use_dora", config.use_dora)):
        if given and without:
            problems.add(key, f"there is none on {without}; leave it out of lora_targets")
    heads = [name for name in targets.linears if not model.is_tied and model.get_submodule(name) is model.lm_head]
    if heads and config.use_dora:
        problems.add("use_dora", f"there is none on the head ('{heads[0]}'); leave it out of lora_targets")
    if config.init in ("pissa", "loftq") and (config.use_dora or without):
        problems.add("lora_init", f"'{config.init}' is for plain LoRA on linear layers alone")


def _check_patterns(config: LoRAConfig, targets: Targets, problems: Problems) -> None:
    for key, pattern in (("lora_rank_pattern", config.rank_pattern), ("lora_alpha_pattern", config.alpha_pattern)):
        for ends, value in pattern.items():
            alone = replace(config, rank_pattern={}, alpha_pattern={ends: math.inf})
            if not any(alone.alpha_of(name) == math.inf for name in targets.names):
                last = {name.rpartition(".")[2] for name in targets.names}
                near = did_you_mean(ends.rpartition(".")[2], last)
                problems.add(key, f"'{ends}' ({value}) fits no adapted layer; one is '{targets.names[0]}'{near}")


def _sizes(model: CausalLM, name: str) -> tuple[int, int]:
    """in and out of what is adapted."""
    path, _, kind = name.rpartition(".")
    parent = model.get_submodule(path)
    if isinstance(parent, Experts) and kind in ("gate_up_proj", "down_proj"):
        return parent.sizes_of(kind)
    layer = model.get_submodule(name)
    if isinstance(layer, Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if isinstance(layer, Router):
        num_experts, hidden_size = layer.weight.shape
        return hidden_size, num_experts
    assert isinstance(layer, Linear | Conv1D)
    return layer.in_features, layer.out_features
