"""How a quantised model is published: the kinds, what each makes of a matrix, and what config.json says of it.

Integers and FP8 are in the form of `compressed-tensors`, which transformers and vLLM read through the library of that
name; NF4 is in bitsandbytes' own. Both are formats of files: neither keeps a type of a library in them. Integers are
made by torchao, NF4 by bitsandbytes.

Scales are bfloat16, and weights are rounded to multiples of the scale as it is stored: a reader that computes in
bfloat16 has the same weights as one that computes in float32, rounded once.

Formats: https://github.com/vllm-project/compressed-tensors; transformers' docs, quantization/bitsandbytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune.errors import CheckpointError, ConfigError, did_you_mean
from torchtune.quantization import libraries
from torchtune.quantization.affine import dequantize, quantize

# Shape and type of a stored tensor.
Described = tuple[tuple[int, ...], torch.dtype]
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
NF4_BLOCK, NF4_NESTED_BLOCK = 64, 256
NF4_STATE = "weight.quant_state.bitsandbytes__nf4"
# Bytes of the JSON that bitsandbytes keeps beside each weight, filled up with spaces: its numbers differ in length,
# and a file's layout is known before they are.
NF4_STATE_BYTES = 320


@dataclass(frozen=True)
class Scheme:
    """A kind of quantised weights, and its options.

    Attributes:
        kind: its name.
        group_size: weights along a row that share a scale; None for the whole row.
        double_quantization: of NF4: its scales are quantised too.
    """

    kind: str
    group_size: int | None = None
    double_quantization: bool = True

    @property
    def bits(self) -> int:
        """Of a weight, without its scale."""
        return 4 if self.kind in ("int4", "nf4") else 8

    @property
    def rounds_activations(self) -> bool:
        """Whether what goes into a layer is rounded as well, token by token, when it computes."""
        return self.kind.endswith("_dynamic")

    @property
    def is_float(self) -> bool:
        """Whether weights are FP8."""
        return self.kind.startswith("fp8")

    @property
    def is_packed(self) -> bool:
        """Whether integers lie several in an int32."""
        return self.kind in ("int4", "int8")

    def need_library(self, key: str) -> None:
        """Import what makes this kind.

        Args:
            key: the option that asks for it, for the message.
        Raises:
            MissingDependencyError: it is not installed.
        """
        if self.kind == "nf4":
            libraries.bitsandbytes(f"{key}={self.kind}")
        elif not self.is_float:
            libraries.torchao(f"{key}={self.kind}")

    def why_not(self, shape: Sequence[int]) -> str | None:
        """Why a matrix of this shape can't be quantised, or None."""
        if self.kind == "nf4" or self.group_size is None or shape[-1] % self.group_size == 0:
            return None
        return f"has rows of {shape[-1]}, which groups of {self.group_size} don't divide"

    def described(self, shape: Sequence[int]) -> dict[str, Described]:
        """What a matrix of this shape is in a file: shape and type by the name behind the layer's."""
        rows, columns = shape
        if self.kind == "nf4":
            return self._described_nf4(rows * columns)
        scale = ((rows, columns // (self.group_size or columns)), torch.bfloat16)
        if not self.is_packed:
            return {"weight": ((rows, columns), FP8 if self.is_float else torch.int8), "weight_scale": scale}
        packed = ((rows, -(-columns * self.bits // 32)), torch.int32)
        return {"weight_packed": packed, "weight_scale": scale, "weight_shape": ((2,), torch.int64)}

    def encode(self, matrix: Tensor) -> dict[str, Tensor]:
        """The tensors that `described` names.

        Raises:
            MissingDependencyError: the kind's library is not installed.
            CheckpointError: a value is not finite, or out of the scales' range.
        """
        if self.kind == "nf4":
            return self._encode_nf4(matrix)
        codes, scale = self.codes(matrix)
        if not self.is_packed:
            return {"weight": codes, "weight_scale": scale}
        return {
            "weight_packed": pack_int32(codes, self.bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(matrix.shape),
        }

    def decode(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The inverse of `encode` up to its rounding: the matrix in `dtype`.

        Raises:
            MissingDependencyError: the kind's library is not installed.
        """
        if self.kind == "nf4":
            return self._decode_nf4(parts, dtype)
        if not self.is_packed:
            return self.dense(parts["weight"], parts["weight_scale"], dtype)
        _, columns = parts["weight_shape"].tolist()
        return self.dense(unpack_int32(parts["weight_packed"], self.bits, columns), parts["weight_scale"], dtype)

    def codes(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """A matrix [out, in] as codes [out, in] (int8 or FP8) and scales [out, groups] (bfloat16), not for NF4."""
        group = self.group_size or matrix.shape[-1]
        if self.is_float:
            return _fp8(matrix)
        high = 2 ** (self.bits - 1) - 1
        # Eight bits are symmetric to the last code; of sixteen codes none is given away.
        low = -high - 1 if self.bits == 4 else -high
        codes, scale, _ = quantize(matrix, group=group, low=low, high=high, symmetric=True, needed_for=self.kind)
        return codes.reshape(matrix.shape), scale.reshape(len(matrix), -1)

    def dense(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Codes [out, in] times scales [out, groups], rounded once to `dtype`."""
        grouped = codes.float().unflatten(-1, (scale.shape[-1], -1))
        return dequantize(grouped, scale.unsqueeze(-1), torch.float32).flatten(-2).to(dtype)

    def rounded(self, matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """What a matrix is after `encode` and `decode` to `dtype`, by default its own type."""
        dtype = dtype or matrix.dtype
        return self.decode(self.encode(matrix), dtype) if self.kind == "nf4" else self.dense(*self.codes(matrix), dtype)

    def config(self, dense_layers: Sequence[str], compute_dtype: torch.dtype) -> dict[str, Any]:
        """The `quantization_config` of config.json.

        Args:
            dense_layers: linear layers that are not quantised, by their names in the checkpoint.
            compute_dtype: what NF4's readers compute in, where they aren't told.
        """
        if self.kind == "nf4":
            return {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "load_in_8bit": False,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": self.double_quantization,
                "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
                "bnb_4bit_quant_storage": "uint8",
                "llm_int8_skip_modules": list(dense_layers),
            }
        kind = {"num_bits": self.bits, "type": "float" if self.is_float else "int", "symmetric": True}
        shared = (
            {"strategy": "channel"} if self.group_size is None else {"strategy": "group", "group_size": self.group_size}
        )
        inputs = {**kind, "strategy": "token", "dynamic": True} if self.rounds_activations else None
        group = {"targets": ["Linear"], "weights": {**kind, **shared, "dynamic": False}, "input_activations": inputs}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized" if self.is_packed else "float-quantized" if self.is_float else "int-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(dense_layers),
        }

    def _described_nf4(self, numel: int) -> dict[str, Described]:
        num_blocks = -(-numel // NF4_BLOCK)
        tensors: dict[str, Described] = {
            "weight": ((-(-numel // 2), 1), torch.uint8),
            "weight.absmax": ((num_blocks,), torch.uint8 if self.double_quantization else torch.float32),
            "weight.quant_map": ((16,), torch.float32),
        }
        if self.double_quantization:
            tensors["weight.nested_absmax"] = ((-(-num_blocks // NF4_NESTED_BLOCK),), torch.float32)
            tensors["weight.nested_quant_map"] = ((256,), torch.float32)
        return {**tensors, NF4_STATE: ((NF4_STATE_BYTES,), torch.uint8)}

    def _encode_nf4(self, matrix: Tensor) -> dict[str, Tensor]:
        library = libraries.bitsandbytes("nf4")
        if not matrix.isfinite().all():
            raise CheckpointError("a weight that is to be quantised holds values that are not finite")
        codes, state = library.quantize_4bit(
            matrix.contiguous() if matrix.dtype.itemsize < 8 else matrix.float(),
            blocksize=NF4_BLOCK,
            compress_statistics=self.double_quantization,
            quant_type="nf4",
        )
        parts = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
        said = bytes(parts[NF4_STATE].tolist()).ljust(NF4_STATE_BYTES)
        assert len(said) == NF4_STATE_BYTES, f"{len(said)} bytes of state"
        return {"weight": codes, **parts, NF4_STATE: torch.tensor(list(said), dtype=torch.uint8)}

    def _decode_nf4(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        library = libraries.bitsandbytes("nf4")
        kept = {name.removeprefix("weight."): tensor for name, tensor in parts.items() if name != "weight"}
        state = library.QuantState.from_dict(kept, device=torch.device("cpu"))
        dense: Tensor = library.dequantize_4bit(parts["weight"], quant_state=state)
        return dense.to(dtype)


GROUPED = ("int4", "int8")
KINDS = ("int8", "int4", "int8_dynamic", "fp8", "fp8_dynamic", "nf4")
DEFAULT_GROUPS = {"int4": 64}


def scheme_of(
    kind: str, *, group_size: int | None = None, double_quantization: bool = True, key: str = "kind"
) -> Scheme:
    """The scheme of a kind.

    Args:
        group_size: by default int4's is 64, and the others have a scale a row.
        key: the option that `kind` came from, for the message.
    Raises:
        ConfigError: there is no such kind, or it has no groups.
    """
    if kind not in KINDS:
        raise ConfigError(f"there is no quantisation '{kind}'{did_you_mean(kind, KINDS)}", key=key)
    if group_size is not None and kind not in GROUPED:
        why = "its blocks have 64 weights" if kind == "nf4" else "it has a scale a row"
        raise ConfigError(f"{kind} has no groups to choose: {why}; {' and '.join(GROUPED)} have", key="group_size")
    return Scheme(kind, group_size or DEFAULT_GROUPS.get(kind), double_quantization)


def scheme_in(config: Mapping[str, Any]) -> Scheme | None:
    """The scheme that a `quantization_config` describes; None where it is none of these, or several at once."""
    if config.get("quant_method") == "bitsandbytes":
        is_nf4 = config.get("load_in_4bit") and config.get("bnb_4bit_quant_type") == "nf4"
        double = bool(config.get("bnb_4bit_use_double_quant"))
        return Scheme("nf4", double_quantization=double) if is_nf4 else None
    groups = list((config.get("config_groups") or {}).values())
    if config.get("quant_method") != "compressed-tensors" or len(groups) != 1 or not isinstance(groups[0], dict):
        return None
    weights, inputs = groups[0].get("weights") or {}, groups[0].get("input_activations")
    for kind in KINDS[:-1]:
        scheme = replace(Scheme(kind), group_size=weights.get("group_size") if kind in GROUPED else None)
        ours = scheme.config((), torch.float32)
        wanted = ours["config_groups"]["group_0"]
        same = _agrees(weights, wanted["weights"]) and (inputs is None) == (wanted["input_activations"] is None)
        same = same and (inputs is None or _agrees(inputs, wanted["input_activations"]))
        if same and config.get("format") == ours["format"]:
            return scheme
    return None


def _agrees(said: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a part of a config says what is wanted; it may say more."""
    return all(said.get(name) == value for name, value in wanted.items())


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """Signed codes [out, in] of 4 or 8 bits, made unsigned, several to an int32, the first in its lowest bits."""
    unsigned = (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    unsigned = F.pad(unsigned, (0, -unsigned.shape[-1] % (32 // bits)))
    if bits == 4:
        unsigned = unsigned[:, ::2] | unsigned[:, 1::2] << 4
    return unsigned.contiguous().view(torch.int32)


def unpack_int32(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_int32`: int8 [out, columns]."""
    unsigned = packed.contiguous().view(torch.uint8)
    if bits == 4:
        unsigned = torch.stack((unsigned & 15, unsigned >> 4), dim=-1).flatten(-2)
    return (unsigned[:, :columns].to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def _fp8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    if not matrix.isfinite().all():
        raise CheckpointError("a weight that is to be quantised holds values that are not finite")
    wide = matrix.float()
    scale = (wide.abs().amax(dim=-1, keepdim=True) / FP8_MAX).clamp(min=torch.finfo(torch.bfloat16).tiny)
    scale = scale.bfloat16()
    # Rounded down, the scale would put a row's largest value beyond what FP8 holds, where it is NaN.
    return (wide / scale.float()).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def nf4_state(stored: Tensor) -> dict[str, Any]:
    """What bitsandbytes says of a weight that it quantised: its shape and type among others.

    Args:
        stored: the tensor that `NF4_STATE` names.
    """
    return dict(json.loads(bytes(stored.tolist()).decode()))
