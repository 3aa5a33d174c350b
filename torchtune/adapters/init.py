"""What an adapter begins as.

default    A uniform within 1 / sqrt(in), as torch's linear layers; B zero, so that training begins at the base
gaussian   A normal with deviation 1 / r; B zero
pissa      A and B from the largest singular vectors of W, which keeps the rest (Meng et al., 2024, arXiv:2404.02948)
loftq      A and B from those of what quantising W lost (Li et al., 2023, arXiv:2310.08659, one round, so that the
           base stays the one that others quantise)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from torchtune.adapters.config import Init
from torchtune.adapters.lora import ExpertsUpdate, LoRAEmbedding, LoRALinear, RouterUpdate
from torchtune.distributed.part import holding, local, part_of, parts
from torchtune.modules.decoder import CausalLM
from torchtune.modules.stored import unstored_parameters


def allocate_lora(model: CausalLM, *, device: torch.device | str, dtype: torch.dtype) -> None:
    """Give the update layers, that may be on the meta device, their memory; the values are not set."""
    held = parts(model)
    for name, parameter in unstored_parameters(model).items():
        path, _, attribute = name.rpartition(".")
        empty = torch.empty(held[name].shape, device=device, dtype=dtype)
        setattr(model.get_submodule(path), attribute, holding(parameter, empty))


@torch.no_grad()
def init_lora(model: CausalLM, init: Init = "default") -> None:
    """Draw A and zero B of all update layers from torch's generator, in the order of the layers.

    What is made of the base's weights is made where they are read (`BaseWeights`): PiSSA's and LoftQ's factors, DoRA's
    magnitudes. Where ranks share a matrix each draws all of it, and keeps its part: the numbers are the same on any
    number of them.
    """
    for module in model.modules():
        if isinstance(module, LoRAEmbedding):
            # The other way round than in linear layers, as in PEFT: A's columns are looked up, a token each.
            _draw(module, "lora_embedding_A", Tensor.zero_)
            _draw(module, "lora_embedding_B", Tensor.normal_)
        elif isinstance(module, LoRALinear | ExpertsUpdate | RouterUpdate):
            _draw(module.lora_A, "weight", _draw_gaussian if init == "gaussian" else _draw_uniform)
            _draw(module.lora_B, "weight", Tensor.zero_)


def _draw(module: nn.Module, name: str, draw: Callable[[Tensor], Tensor]) -> None:
    held, part = local(getattr(module, name)), part_of(module, name)
    if part.is_whole:
        draw(held)
    else:
        held.copy_(part.of(draw(held.new_empty(part.whole))))


def _draw_gaussian(a: Tensor) -> Tensor:
    return a.normal_(std=1 / a.shape[-2])


def _draw_uniform(a: Tensor) -> Tensor:
    bound = 1 / math.sqrt(a.shape[-1])
    return a.uniform_(-bound, bound)


def factors(matrix: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] whose product, scaled, is the best approximation of `matrix` [out, in] of that rank.

    The singular values are shared between the two by their square root.
    """
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root
