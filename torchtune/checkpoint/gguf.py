"""A GGUF file as a source of weights: header, tensor table, and the way back to Hugging Face names and layout.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is read here, since the
`gguf` library takes seconds for a large vocabulary; that library dequantises.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchtune.checkpoint.headers import TensorHeader
from torchtune.errors import CheckpointError, MissingDependencyError, UnsupportedError, did_you_mean

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
F32 = 0

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

# Within a block and outside; the same for all architectures of the Llama kind.
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROOT_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class _Entry:
    name: str
    dims: tuple[int, ...]  # as ggml counts them: the contiguous one first
    kind: int
    offset: int


class GGUFFile:
    """The tensors of a GGUF file under Hugging Face names, and its metadata.

    Attributes:
        metadata: the file's key-value pairs.
        headers: tensors by Hugging Face name. They are float32 when all of the file is, else bfloat16.

    Raises:
        CheckpointError: the file is cut or no GGUF file.
        UnsupportedError: an architecture or a tensor that is not known here.
        MissingDependencyError: quantised weights without the `gguf` library.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
        if self._data[:4] != b"GGUF":
            raise CheckpointError("is no GGUF file", path=path)
        self.metadata, entries = self._parse()
        self.architecture = str(self.metadata.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise UnsupportedError(
                f"{path}: GGUF architecture '{self.architecture}' is not supported"
                f"{did_you_mean(self.architecture, ARCHITECTURES)}"
            )
        self.rope_factors: np.ndarray | None = None
        self._entries: dict[str, _Entry] = {}
        for entry in entries:
            if entry.name == ROPE_FACTORS:
                self.rope_factors = self._read_entry(entry)
            else:
                self._entries[self._hf_name(entry.name)] = entry
        is_float32 = all(entry.kind == F32 for entry in self._entries.values())
        saved_as = torch.float32 if is_float32 else torch.bfloat16
        self.headers = {
            name: TensorHeader(tuple(reversed(entry.dims)), saved_as, path) for name, entry in self._entries.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """One tensor as float32 on the CPU, in the half-rotated layout."""
        weight = self._read_entry(self._entries[name])
        if self.architecture == "llama" and (match := re.search(r"\.([qk])_proj\.", name)):
            weight = _unpermuted(weight, self.num_heads if match[1] == "q" else self.num_kv_heads)
        # A copy: the mapping is read-only, and a tensor may be trained in place.
        return torch.from_numpy(
            np.array(weight, order="C") if not weight.flags.writeable else np.ascontiguousarray(weight)
        )

    def close(self) -> None:
        """Nothing is held open but the mapping, which ends with this object."""

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return int(self.metadata[f"{self.architecture}.attention.head_count"])

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads."""
        return int(self.metadata.get(f"{self.architecture}.attention.head_count_kv", self.num_heads))

    def _hf_name(self, name: str) -> str:
        stem, _, suffix = name.rpartition(".")
        if match := re.fullmatch(r"blk\.(\d+)\.(.+)", stem):
            if match[2] in BLOCK_NAMES:
                return f"model.layers.{match[1]}.{BLOCK_NAMES[match[2]]}.{suffix}"
        elif stem in ROOT_NAMES:
            return f"{ROOT_NAMES[stem]}.{suffix}"
        raise UnsupportedError(f"{self.path}: tensor '{name}' is not known for architecture '{self.architecture}'")

    def _parse(self) -> tuple[dict[str, Any], list[_Entry]]:
        reader = _Reader(self._data, self.path)
        version = reader.scalar("I", at=4)
        if version not in (2, 3):
            raise UnsupportedError(f"{self.path}: GGUF version {version} is not supported; versions 2 and 3 are")
        num_tensors, num_pairs = reader.scalar("Q"), reader.scalar("Q")
        metadata = {}
        for _ in range(num_pairs):
            key = reader.string()
            metadata[key] = reader.value(reader.scalar("I"))
        entries = []
        for _ in range(num_tensors):
            name = reader.string()
            dims = tuple(reader.scalar("Q") for _ in range(reader.scalar("I")))
            entries.append(_Entry(name, dims, reader.scalar("I"), reader.scalar("Q")))
        alignment = int(metadata.get("general.alignment", 32))
        self._start = -(-reader.position // alignment) * alignment
        for entry in entries:
            end = self._start + entry.offset + self._num_bytes(entry)
            if end > len(self._data):
                raise CheckpointError(
                    f"it has {len(self._data)} bytes where tensor '{entry.name}' ends at {end}; download it again",
                    path=self.path,
                )
        return metadata, entries

    def _num_bytes(self, entry: _Entry) -> int:
        block, size = self._quant_sizes(entry)
        return int(np.prod(entry.dims)) // block * size

    def _quant_sizes(self, entry: _Entry) -> tuple[int, int]:
        gguf = _gguf_library()
        try:
            block, size = gguf.constants.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(entry.kind)]
        except (ValueError, KeyError) as error:
            raise UnsupportedError(
                f"{self.path}: tensor '{entry.name}' has the unknown quantisation {entry.kind}"
            ) from error
        return block, size

    def _read_entry(self, entry: _Entry) -> np.ndarray:
        shape = tuple(reversed(entry.dims))
        start = self._start + entry.offset
        raw = np.frombuffer(self._data, dtype=np.uint8, count=self._num_bytes(entry), offset=start)
        if entry.kind == F32:
            return raw.view(np.float32).reshape(shape)
        gguf = _gguf_library()
        kind = gguf.GGMLQuantizationType(entry.kind)
        try:
            return gguf.quants.dequantize(raw.reshape(*shape[:-1], -1), kind).reshape(shape)
        except NotImplementedError as error:
            raise UnsupportedError(
                f"{self.path}: the gguf library can't dequantise {kind.name} ('{entry.name}')"
            ) from error


class _Reader:
    """Walks along the header's bytes."""

    def __init__(self, data: mmap.mmap | bytes, path: Path) -> None:
        self.data = data
        self.path = path
        self.position = 0

    def scalar(self, code: str, at: int | None = None) -> Any:
        self.position = self.position if at is None else at
        try:
            (value,) = struct.unpack_from("<" + code, self.data, self.position)
        except struct.error as error:
            raise CheckpointError(f"ends at {len(self.data)} bytes, within its header", path=self.path) from error
        self.position += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        start, self.position = self.position, self.position + length
        if self.position > len(self.data):
            raise CheckpointError(f"ends at {len(self.data)} bytes, within its header", path=self.path)
        return self.data[start : self.position].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.scalar(SCALARS[kind])
        item, length = self.scalar("I"), self.scalar("Q")
        if item in (STRING, ARRAY):
            return [self.value(item) for _ in range(length)]
        values = struct.unpack_from(f"<{length}{SCALARS[item]}", self.data, self.position)
        self.position += struct.calcsize(f"<{length}{SCALARS[item]}")
        return list(values)


def _unpermuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from pairs (0, 1), (2, 3), ... to halves: the layout of Hugging Face checkpoints."""
    rest = weight.shape[1:]
    return weight.reshape(num_heads, -1, 2, *rest).swapaxes(1, 2).reshape(weight.shape)


def _gguf_library() -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise MissingDependencyError("gguf", extra="gguf", needed_for="a GGUF checkpoint") from error
    return gguf
