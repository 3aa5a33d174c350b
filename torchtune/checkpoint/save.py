"""Writing a complete Hugging Face folder: weights, config, tokenizer, template, and what lay beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from torchtune.checkpoint.folder import INDEX, SINGLE
from torchtune.checkpoint.open import TIED_HEAD, Checkpoint

MAX_SHARD_BYTES = 5 * 10**9
# Weights in any form, and what belongs to a run of ours; everything else of a folder is carried over.
NOT_CARRIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json", ".ckpt")
NOT_CARRIED_NAMES = {"manifest.json", "config.json", "generation_config.json"}
MAX_CARRIED_BYTES = 100 * 2**20


def save_model(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    checkpoint: Checkpoint,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model into `folder` as the checkpoint that it came from.

    Each tensor gets the type that it has in `checkpoint`, the names are the same, no field of the config is
    dropped, and a tied head is written only where the source had a copy of it.

    Args:
        tensors: names and values, of any float type, on any device.
        max_shard_bytes: bytes of a file at most; beyond it there are shards and an index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(folder, _as_in_source(tensors, checkpoint), checkpoint, max_shard_bytes)
    _write_json(folder / "config.json", _honest_config(checkpoint))
    if checkpoint.generation_config is not None:
        _write_json(folder / "generation_config.json", checkpoint.generation_config)
    for name, content in checkpoint.files.items():
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)
    if checkpoint.path.is_dir():
        _carry_over(checkpoint.path, folder)


def saved_dtype(checkpoint: Checkpoint, name: str) -> torch.dtype:
    """The type in which `save_model` writes a tensor."""
    return checkpoint.tensors[name].dtype


def _as_in_source(tensors: Iterable[tuple[str, Tensor]], checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    has_head_copy = TIED_HEAD in checkpoint.tensors
    for name, tensor in tensors:
        saved = tensor.detach().to(device="cpu", dtype=saved_dtype(checkpoint, name)).contiguous()
        yield name, saved
        if name == TIED_HEAD:
            has_head_copy = False
        if name == "model.embed_tokens.weight" and has_head_copy and checkpoint.config.get("tie_word_embeddings"):
            yield TIED_HEAD, saved.clone()


def _write_weights(folder: Path, tensors: Iterator[tuple[str, Tensor]], source: Checkpoint, max_bytes: int) -> None:
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


def _honest_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The source's config; its dtype key, under the spelling it has, says what the file holds."""
    config = dict(checkpoint.config)
    sizes: dict[torch.dtype, int] = {}
    for header in checkpoint.tensors.values():
        sizes[header.dtype] = sizes.get(header.dtype, 0) + torch.Size(header.shape).numel()
    held = max(sizes, key=lambda dtype: sizes[dtype])
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


def masters(named: Iterable[tuple[str, Tensor]], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The parameters that the model's files would round: what a resume needs besides them."""
    return {
        name: tensor
        for name, tensor in named
        if torch.promote_types(saved_dtype(checkpoint, name), tensor.dtype) != saved_dtype(checkpoint, name)
    }
