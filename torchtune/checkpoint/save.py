"""Writing a complete Hugging Face folder: weights, config, tokenizer, template, and what lay beside them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from torchtune.checkpoint.folder import INDEX, SINGLE
from torchtune.checkpoint.open import TIED_HEADS, Checkpoint
from torchtune.errors import CheckpointError
from torchtune.modules.decoder import CausalLM
from torchtune.modules.stored import stored_pieces, stored_tensors

MAX_SHARD_BYTES = 5 * 10**9
# Weights in any form, and what belongs to a run of ours; everything else of a folder is carried over.
NOT_CARRIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json", ".ckpt")
# Meta's params.json would tell other readers that the folder is of Meta's layout.
NOT_CARRIED_NAMES = {"manifest.json", "config.json", "generation_config.json", "params.json", "checklist.chk"}
MAX_CARRIED_BYTES = 100 * 2**20


def save_model(
    folder: Path,
    model: CausalLM,
    checkpoint: Checkpoint,
    *,
    max_shard_bytes: int | None = None,
    dtype: torch.dtype | None = None,
    values: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Write a model into `folder` as the checkpoint that it came from.

    Each tensor gets the type that it has in `checkpoint`, the names are the same, no field of the config but
    `quantization_config` is dropped, a tied head is written only where the source had a copy of it, and what the
    source holds beside the model (a vision tower) is written as it was.

    Args:
        model: its parameters may have any float type, on any device.
        max_shard_bytes: bytes of a file at most; beyond it there are shards and an index. By default those of the
            source's largest shard, or 5 GB where it is one file.
        dtype: the type of all floats, in place of the source's.
        values: makes of a parameter's name and what the model holds what is written, before it is cast: merged
            adapters. One is made at a time.
    Raises:
        CheckpointError: one of `values` is not finite, or would not be in the type that it is saved in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(
        folder,
        _as_in_source(model, checkpoint, dtype, values),
        max_shard_bytes or _shard_bytes(checkpoint) or MAX_SHARD_BYTES,
    )
    _write_json(folder / "config.json", _honest_config(checkpoint, dtype))
    save_text_files(folder, checkpoint)
    if checkpoint.path.is_dir():
        _carry_over(checkpoint.path, folder)


def save_text_files(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the tokenizer, the chat template and the generation config."""
    if checkpoint.generation_config is not None:
        _write_json(folder / "generation_config.json", checkpoint.generation_config)
    for name, content in checkpoint.files.items():
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)


def _as_in_source(
    model: CausalLM,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
    values: Callable[[str, Tensor], Tensor] | None,
) -> Iterator[tuple[str, Tensor]]:
    carried = checkpoint.carried(model)
    pieces = stored_pieces(model)
    embedding = pieces[model.vocabulary_parameters[0]][0].name
    for own_name, held in stored_tensors(model).items():
        tensor = held.detach() if values is None else values(own_name, held)
        for piece in pieces[own_name]:
            name, part = piece.name, tensor[piece.index] if piece.index else tensor
            saved = part.to(device="cpu", dtype=dtype or checkpoint.tensors[name].dtype).contiguous()
            if values is not None and not saved.isfinite().all():
                raise CheckpointError(_why_not_finite(name, part, saved.dtype), path=checkpoint.path)
            yield name, saved
            if name == embedding and model.is_tied:
                for head in sorted(carried):
                    if head.endswith(TIED_HEADS):
                        yield head, saved.clone()
    for name in sorted(carried):
        if not (model.is_tied and name.endswith(TIED_HEADS)):
            tensor = checkpoint.weights.read(name)
            yield name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _why_not_finite(name: str, tensor: Tensor, dtype: torch.dtype) -> str:
    """Of a tensor that is to be saved as `dtype`: fp16 ends at 65,504."""
    largest = tensor.abs().max().item()
    if math.isfinite(largest):
        return f"'{name}' has a value of {largest:.4g}, beyond what {dtype} holds; save it in bfloat16 or float32"
    return f"'{name}' has a value of {largest}: it is not saved"


def _shard_bytes(checkpoint: Checkpoint) -> int | None:
    """Bytes of the source's largest shard; None where all lies in one file, or in fewer bytes than it will have."""
    if checkpoint.config.get("quantization_config"):
        return None
    sizes: dict[Path, int] = {}
    for header in checkpoint.tensors.values():
        sizes[header.file] = sizes.get(header.file, 0) + torch.Size(header.shape).numel() * header.dtype.itemsize
    return max(sizes.values()) if len(sizes) > 1 else None


def _write_weights(folder: Path, tensors: Iterator[tuple[str, Tensor]], max_bytes: int) -> None:
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    num_bytes = total = 0

    def write() -> None:
        shards.append(list(shard))
        save_file(shard, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shard.clear()

    for name, tensor in tensors:
        if shard and num_bytes + tensor.nbytes > max_bytes:
            write()
            num_bytes = 0
        shard[name] = tensor
        num_bytes += tensor.nbytes
        total += tensor.nbytes
    write()
    if len(shards) == 1:
        (folder / "shard-1").rename(folder / SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        (folder / f"shard-{number}").rename(folder / file_name)
        weight_map.update(dict.fromkeys(names, file_name))
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _honest_config(checkpoint: Checkpoint, dtype: torch.dtype | None) -> dict[str, Any]:
    """The source's config; its dtype key, under the spelling it has, says what the file holds.

    Weights that were quantised in the source (MXFP4) are not in what is saved, so the config doesn't say it either.
    """
    config = dict(checkpoint.config)
    if config.get("quantization_config"):
        del config["quantization_config"]
    held = dtype or checkpoint.held_dtype
    for key in ("dtype", "torch_dtype"):
        if config.get(key) is not None and str(config[key]).removeprefix("torch.") != str(held).removeprefix("torch."):
            config[key] = str(held).removeprefix("torch.")
    return config


def _carry_over(source: Path, folder: Path) -> None:
    for entry in sorted(source.iterdir()):
        carried = (
            entry.is_file()
            and not entry.name.startswith(".")
            and not entry.name.endswith(NOT_CARRIED)
            and entry.name not in NOT_CARRIED_NAMES
            and entry.stat().st_size <= MAX_CARRIED_BYTES
        )
        if carried and not (folder / entry.name).exists():
            shutil.copyfile(entry, folder / entry.name)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def masters(model: CausalLM, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The parameters that the model's files would round, by name: what a resume needs besides them."""
    pieces = stored_pieces(model)
    rounded: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        dtype = checkpoint.tensors[pieces[name][0].name].dtype
        if torch.promote_types(dtype, parameter.dtype) != dtype:
            rounded[name] = parameter
    return rounded
