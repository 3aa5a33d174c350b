"""What an adapter begins as.

default    A uniform within 1 / sqrt(in), as torch's linear layers; B zero, so that training begins at the base
gaussian   A normal with deviation 1 / r; B zero
pissa      A and B from the largest singular vectors of W, which keeps the rest (Meng et al., 2024, arXiv:2404.02948)
loftq      A and B from those of what quantising W lost (Li et al., 2023, arXiv:2310.08659, one round, so that the
           base stays the one that others quantise)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torchtune.adapters.config import Init
from torchtune.adapters.lora import ExpertsUpdate, LoRAEmbedding, LoRALinear, RouterUpdate
from torchtune.modules.decoder import CausalLM
from torchtune.modules.stored import unstored_parameters


def allocate_lora(model: CausalLM, *, device: torch.device | str, dtype: torch.dtype) -> None:
    """Give the update layers, that may be on the meta device, their memory; the values are not set."""
    for name, parameter in unstored_parameters(model).items():
        path, _, attribute = name.rpartition(".")
        empty = torch.empty(parameter.shape, device=device, dtype=dtype)
        setattr(model.get_submodule(path), attribute, nn.Parameter(empty, parameter.requires_grad))


@torch.no_grad()
def init_lora(model: CausalLM, init: Init = "default") -> None:
    """Draw A and zero B of all update layers from torch's generator, in the order of the layers.

    What is made of the base's weights is made where they are read: `factors` (PiSSA, LoftQ), `init_magnitudes` (DoRA).
    """
    for module in model.modules():
        if isinstance(module, LoRAEmbedding):
            # The other way round than in linear layers, as in PEFT: A's columns are looked up, a token each.
            module.lora_embedding_A.zero_()
            module.lora_embedding_B.normal_()
        elif isinstance(module, LoRALinear | ExpertsUpdate | RouterUpdate):
            a, b = module.lora_A.weight, module.lora_B.weight
            if init == "gaussian":
                a.normal_(std=1 / a.shape[-2])
            else:
                bound = 1 / math.sqrt(a.shape[-1])
                a.uniform_(-bound, bound)
            b.zero_()


@torch.no_grad()
def init_magnitudes(model: CausalLM) -> None:
    """Set DoRA's magnitudes to the lengths of the rows as they are, once weights and A and B are there."""
    for module in model.modules():
        if isinstance(module, LoRALinear) and module.lora_magnitude_vector is not None:
            module.lora_magnitude_vector.copy_(module.row_norms())


def factors(matrix: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] whose product, scaled, is the best approximation of `matrix` [out, in] of that rank.

    The singular values are shared between the two by their square root.
    """
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root
