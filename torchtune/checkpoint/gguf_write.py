"""A checkpoint as a GGUF file: planned from headers alone, proven, then written a tensor at a time.

The plan has the metadata (gguf_write_keys.py, gguf_write_rope.py, tokenizers/gguf_write.py), the tensors with their
types (gguf_write_layout.py, gguf_write_types.py) and is read back before anything is written (gguf_write_proof.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchtune.checkpoint.gguf import gguf_library
from torchtune.checkpoint.gguf_write_file import GGUFWriter, PlannedTensor
from torchtune.checkpoint.gguf_write_keys import find_written, model_keys, rope_options, text_config, with_defaults
from torchtune.checkpoint.gguf_write_layout import Placement, place_tensors
from torchtune.checkpoint.gguf_write_limits import notes_on_reading, refuse_what_is_read_otherwise
from torchtune.checkpoint.gguf_write_proof import PlannedFile, prove_same_model
from torchtune.checkpoint.gguf_write_rope import rope_scaling
from torchtune.checkpoint.gguf_write_types import QUANTIZATION_VERSION, TYPES, GGUFType, as_bytes, type_of_tensor
from torchtune.checkpoint.open import OLD_BUFFERS, TIED_HEADS, Checkpoint
from torchtune.errors import CheckpointError, UnsupportedError
from torchtune.modules.decoder import CausalLM
from torchtune.modules.stored import stored_tensors
from torchtune.tokenizers.files import has_vocabulary
from torchtune.tokenizers.gguf_write import tokenizer_keys

# The type of a file that is to be as its checkpoint is.
AS_STORED = {torch.float32: "f32", torch.float64: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class GGUFPlan:
    """All of a file but its weights.

    Attributes:
        tensors: by name, in the order of the file.
        constants: values of those that come from the config.
        placements: what each of the model's parameters becomes.
        notes: what a user should know, in lines.
    """

    kind: GGUFType
    metadata: dict[str, Any]
    tensors: dict[str, PlannedTensor]
    constants: dict[str, Tensor]
    placements: dict[str, list[Placement]] = field(repr=False)
    notes: list[str]

    def write(self, path: Path, model: CausalLM, values: Callable[[str, Tensor], Tensor]) -> None:
        """Write the file; one parameter is in memory at a time.

        Args:
            model: as it was built, on the meta device.
            values: makes of a parameter's name and what the model holds what is written; called once for each.
        Raises:
            CheckpointError: a value that is not finite, or beyond what its type holds.
        """
        library = gguf_library()
        with GGUFWriter(path, self.metadata, self.tensors, library) as file:
            for name, tensor in self.constants.items():
                file.write(name, as_bytes(tensor, self.tensors[name].kind, library, name=name))
            for own_name, held in stored_tensors(model).items():
                self._write_parameter(file, own_name, values(own_name, held))  # let go of before the next is made

    def _write_parameter(self, file: GGUFWriter, own_name: str, value: Tensor) -> None:
        # Sums in the narrow types (Gemma's norms) would be rounded twice.
        value = value.detach().to(device="cpu", dtype=torch.promote_types(value.dtype, torch.float32))
        for placement in self.placements[own_name]:
            for part, tensor in placement(value):
                kind = self.tensors[part.name].kind
                file.write(part.name, as_bytes(tensor, kind, gguf_library(), name=own_name), part.index or 0)


def plan_gguf(checkpoint: Checkpoint, model: CausalLM, *, kind: str | None, name: str) -> GGUFPlan:
    """Plan the file of a checkpoint; no weight is read.

    Args:
        model: the checkpoint's, on the meta device.
        kind: one of `TYPES`; None: as most of the checkpoint's weights are.
        name: the model's, for people.
    Raises:
        UnsupportedError: a family, an option or a tokenizer that can't be written; names it.
        MissingDependencyError: the `gguf` library is not there.
    """
    config = text_config(checkpoint.config)
    library, family = gguf_library(), find_written(config)
    architecture, chosen = family.architecture, TYPES[kind or AS_STORED[checkpoint.held_dtype]]
    notes: list[str] = []
    try:
        values = with_defaults(config)
        refuse_what_is_read_otherwise(values)
        notes += notes_on_reading(values, rope_options(values))
        more, constants = rope_scaling(values, rope_options(values), architecture, library)
        placements, shapes, num_parts = place_tensors(config, architecture, library)
        shapes = {rope: tuple(tensor.shape) for rope, tensor in constants.items()} | shapes
        tensors = _typed(chosen, shapes, num_parts, library, is_tied=model.is_tied, notes=notes)
        metadata = {
            **_general(architecture, chosen, name),
            **{f"{architecture}.{key}": value for key, value in {**model_keys(config), **more}.items()},
            **_tokenizer(checkpoint, architecture, values.vocab_size, notes),
        }
        prove_same_model(PlannedFile(checkpoint.path, metadata, tensors, constants), config)
    except UnsupportedError as error:
        raise UnsupportedError(f"{checkpoint.path}: {error}") from error
    notes += _left_out(checkpoint, model)
    return GGUFPlan(chosen, metadata, tensors, constants, placements, notes)


def _general(architecture: str, kind: GGUFType, name: str) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": name,
        "general.file_type": kind.file_type,
    }
    return keys | ({"general.quantization_version": QUANTIZATION_VERSION} if kind.is_quantised else {})


def _typed(
    kind: GGUFType,
    shapes: dict[str, tuple[int, ...]],
    num_parts: dict[str, int],
    library: Any,
    *,
    is_tied: bool,
    notes: list[str],
) -> dict[str, PlannedTensor]:
    tensors = {
        name: PlannedTensor(
            name, shape, type_of_tensor(kind, name, shape, library, is_tied=is_tied), num_parts.get(name, 1)
        )
        for name, shape in shapes.items()
    }
    wider = [tensor for tensor in tensors.values() if kind.is_quantised and tensor.kind.name == "f16"]
    if wider:
        lengths = ", ".join(str(length) for length in sorted({tensor.shape[-1] for tensor in wider}))
        notes.append(
            f"{len(wider)} of {len(tensors)} tensors are written as f16: their rows of {lengths} are no multiple of "
            f"the {kind.block(library)} of a block of {kind.name} ({_some(tensor.name for tensor in wider)})"
        )
    return tensors


def _tokenizer(checkpoint: Checkpoint, architecture: str, num_rows: int, notes: list[str]) -> dict[str, Any]:
    if not has_vocabulary(checkpoint.files):
        notes.append("there is no tokenizer beside the weights, so the file has none")
        return {"tokenizer.ggml.model": "none"}
    try:
        written = tokenizer_keys(
            checkpoint.tokenizer(),
            architecture=architecture,
            num_rows=num_rows,
            stop_ids=checkpoint.stop_ids,
            chat_template=checkpoint.chat_template,
            sentencepiece=checkpoint.files.get("tokenizer.model"),
        )
    except CheckpointError as error:
        raise UnsupportedError(f"its tokenizer can't be written to a GGUF file: {error.problem}") from error
    notes += written.notes
    return written.keys


def _left_out(checkpoint: Checkpoint, model: CausalLM) -> list[str]:
    """What a file of the text model does not have: towers that see, layers that predict further tokens."""
    left = sorted(
        name
        for name in checkpoint.carried(model)
        if not name.endswith(TIED_HEADS) and not any(re.search(pattern, name) for pattern in OLD_BUFFERS)
    )
    return [f"{len(left)} tensors that are no part of the text model are left out ({_some(left)})"] if left else []


def _some(names: Iterable[str]) -> str:
    known = list(names)
    return ", ".join(known[:3]) + (f" and {len(known) - 3} more" if len(known) > 3 else "")
