"""The types that a GGUF file is written in, and which tensors keep a wider one.

As llama.cpp does it: what has one dimension, routers and tables of positions are float32; rows that the block of a
type does not divide are float16. Under four and five bits the projection to the vocabulary is in eight, since its
rounding falls on every logit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchtune.errors import CheckpointError

FP16_MAX = 65504.0
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# llama.cpp multiplies these in float32, or has no other code for them.
ALWAYS_F32 = re.compile(r"(_norm|ffn_gate_inp|ffn_gate_inp_shexp|position_embd)\.weight$|\.bias$|^rope_")
# The version of the blocks' layouts; there has been no other since 2023.
QUANTIZATION_VERSION = 2


@dataclass(frozen=True)
class GGUFType:
    """A type by the name that users type.

    Attributes:
        file_type: the number under `general.file_type` for a file of mostly this.
        steps: a block's scale is its largest value over this, in float16; none for plain floats.
    """

    name: str
    file_type: int
    steps: int | None = None

    @property
    def is_quantised(self) -> bool:
        """Whether it has blocks."""
        return self.steps is not None

    @property
    def largest(self) -> float:
        """What it can hold."""
        if self.name in ("f32", "bf16"):
            return float(torch.finfo(FLOATS[self.name]).max)
        return FP16_MAX * (self.steps or 1)

    def number(self, library: Any) -> int:
        """The type of a tensor, as ggml numbers it."""
        return int(library.GGMLQuantizationType[self.name.upper()])

    def block(self, library: Any) -> int:
        """Elements of a block."""
        return int(library.GGML_QUANT_SIZES[self.number(library)][0])

    def num_bytes(self, num_elements: int, library: Any) -> int:
        """Of whole rows."""
        block, block_bytes = library.GGML_QUANT_SIZES[self.number(library)]
        return num_elements // int(block) * int(block_bytes)


# Four-bit blocks of kind 0 reach to -8 and +7 times their scale, those of kind 1 begin at a float16 of their own.
TYPES = {
    kind.name: kind
    for kind in (
        GGUFType("f32", 0),
        GGUFType("f16", 1),
        GGUFType("bf16", 32),
        GGUFType("q8_0", 7, steps=127),
        GGUFType("q5_0", 8, steps=16),
        GGUFType("q5_1", 9, steps=1),
        GGUFType("q4_0", 2, steps=8),
        GGUFType("q4_1", 3, steps=1),
    )
}
FEW_BITS = {"q5_0", "q5_1", "q4_0", "q4_1"}


def type_of_tensor(asked: GGUFType, name: str, shape: tuple[int, ...], library: Any, *, is_tied: bool) -> GGUFType:
    """The type that a tensor of the file gets, where `asked` is the file's.

    Args:
        name: in the file.
        shape: as torch counts it.
        is_tied: the embedding is the projection to the vocabulary, too.
    """
    if len(shape) == 1 or ALWAYS_F32.search(name):
        return TYPES["f32"]
    projects = name == "output.weight" or (is_tied and name == "token_embd.weight")
    kind = TYPES["q8_0"] if projects and asked.name in FEW_BITS else asked
    return TYPES["f16"] if shape[-1] % kind.block(library) else kind


def as_bytes(tensor: Tensor, kind: GGUFType, library: Any, *, name: str) -> np.ndarray:
    """A tensor's bytes in a type, rounded once.

    Raises:
        CheckpointError: a value is not finite, or beyond what the type holds; names the tensor.
    """
    largest = tensor.abs().max().item()
    if not largest <= kind.largest:  # a nan compares as false
        remedy = "" if largest == float("inf") or largest != largest else "; write it as f32 or bf16"
        raise CheckpointError(
            f"'{name}' has a value of {largest:.4g}, beyond the {kind.largest:.4g} that {kind.name} holds{remedy}"
        )
    if kind.name in FLOATS:
        return tensor.to(FLOATS[kind.name]).contiguous().view(-1).view(torch.uint8).numpy()
    values = tensor.to(torch.float32).contiguous().numpy()
    quantised: np.ndarray = library.quants.quantize(values, library.GGMLQuantizationType(kind.number(library)))
    return np.ascontiguousarray(quantised).reshape(-1)
