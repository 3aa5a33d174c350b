"""The kinds of packed weights by name, and which weights of a model are packed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from torchtune.errors import ConfigError, did_you_mean
from torchtune.modules.decoder import Decoder
from torchtune.modules.moe import Experts
from torchtune.modules.packed import PackedWeight
from torchtune.quantization import libraries
from torchtune.quantization.int4 import Int4Weight
from torchtune.quantization.int8 import Int8Weight
from torchtune.quantization.nf4 import NF4Weight

KINDS: dict[str, type[NF4Weight | Int8Weight | Int4Weight]] = {"nf4": NF4Weight, "int8": Int8Weight, "int4": Int4Weight}


def packer(
    kind: str, *, double_quantization: bool = True, key: str = "base_quantization"
) -> Callable[[Tensor], PackedWeight]:
    """What packs a weight (a matrix, or a stack of them) as this kind, on the device where it lies.

    Beside the weight and the packed one it takes some 10 MB, and frees them.

    Args:
        double_quantization: NF4's scales are quantised too; the others have nothing like it.
        key: the option that `kind` came from, for the message.
    Raises:
        ConfigError: there is no such kind.
        MissingDependencyError: its library is not installed.
    """
    if kind == "nf4":
        libraries.bitsandbytes(f"{key} {kind}")
        return partial(NF4Weight.pack, double_quantization=double_quantization)
    if kind in ("int8", "int4"):
        libraries.torchao(f"{key} {kind}")
        return KINDS[kind].pack
    raise ConfigError(f"there is no quantisation '{kind}'{did_you_mean(kind, KINDS)}", key=key)


def packable(model: nn.Module) -> list[str]:
    """The parameters that a quantised base packs: weights of linear layers and experts in the decoder's layers.

    Embeddings, head, routers, norms and biases stay as they are. The model may be on the meta device.
    """
    inside = {part for module in model.modules() if isinstance(module, Decoder) for part in module.layers.modules()}
    names = []
    for path, module in model.named_modules():
        if module not in inside:
            continue
        # A layer with one output is a gate, and next to nothing (Qwen2-MoE's shared expert).
        if getattr(module, "is_linear", False) and module.out_features > 1:
            names.append(f"{path}.weight")
        elif isinstance(module, Experts):
            names += [f"{path}.gate_up_proj", f"{path}.down_proj"]
    return names
