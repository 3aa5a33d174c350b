"""Writing a complete Hugging Face folder: weights, config, tokenizer, template, and what lay beside them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from torchtune.checkpoint.folder import INDEX, SAFETENSORS, SINGLE, writing_rank
from torchtune.checkpoint.held import Held, Scratch
from torchtune.checkpoint.open import TIED_HEADS, Checkpoint
from torchtune.checkpoint.tensor_writer import TensorWriter
from torchtune.distributed.part import parts
from torchtune.distributed.peers import open_peers
from torchtune.errors import CheckpointError
from torchtune.modules.decoder import CausalLM
from torchtune.modules.stored import Piece, stored_pieces, stored_tensors
from torchtune.quantization.encoding import Encoding

MAX_SHARD_BYTES = 5 * 10**9
MIN_SHARD_BYTES = 64 * 2**20
# Weights in any form, and what belongs to a run of ours; everything else of a folder is carried over.
NOT_CARRIED = (
    ".safetensors", ".bin", ".pt", ".pth", ".pt2", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json", ".ckpt",
)  # fmt: skip
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
    held: Held | None = None,
    encoding: Encoding | None = None,
) -> None:
    """Write a model into `folder` as the checkpoint that it came from. Every rank calls it, and writes files of its own.

    Each tensor gets the type that it has in `checkpoint`, the names are the same, no field of the config but
    `quantization_config` is dropped, a tied head is written only where the source had a copy of it, and what the
    source holds beside the model (a vision tower) is written as it was. No rank has more than one tensor in memory
    besides what it holds of the model.

    Args:
        model: its parameters may have any float type, on any device, and be split in any way.
        max_shard_bytes: bytes of a file at most; beyond it there are shards and an index. By default those of the
            source's largest shard, or 5 GB where it is one file. Several ranks make files enough for all.
        dtype: the type of all floats, in place of the source's.
        values: makes of a parameter's name and what the model holds what is written, before it is cast: merged
            adapters. One is made at a time. Where its `needs_held(name)` denies it, it is not given the whole.
        held: what the ranks hold, where that is known already; by default it is found out.
        encoding: which tensors are written quantised, and how; the config says so.
    Raises:
        CheckpointError: one of `values` is not finite, or would not be in the type that it is saved in.
        RankError: another rank failed.
    """
    if held is None:
        with open_peers() as peers:
            everything = Held.by(model, peers)
            save_model(
                folder,
                model,
                checkpoint,
                max_shard_bytes=max_shard_bytes,
                dtype=dtype,
                values=values,
                held=everything,
                encoding=encoding,
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    plan = _plan(model, checkpoint, dtype, encoding)
    max_bytes = max_shard_bytes or _shard_bytes(checkpoint) or MAX_SHARD_BYTES
    files = _files(plan, _bytes_a_file(plan, max_bytes, held.peers.size))
    writer = _Writer(folder, checkpoint, values, held, encoding)
    writer.write(files)
    if held.peers.is_main:
        held.attempt(partial(save_rest, folder, checkpoint, dtype, files=files, encoding=encoding))
    held.attempt.finish()
    held.peers.meet()


def save_text_files(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the tokenizer, the chat template and the generation config."""
    if checkpoint.generation_config is not None:
        _write_json(folder / "generation_config.json", checkpoint.generation_config)
    for name, content in checkpoint.files.items():
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)


@dataclass(frozen=True)
class _Entry:
    """A tensor of the files.

    Attributes:
        own_name: the parameter that it comes from; None where it is read from the source again.
        piece: what it is of that.
        encoded: the tensor that it is made of by quantising, where it is.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    own_name: str | None = None
    piece: Piece | None = None
    encoded: str | None = None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _plan(
    model: CausalLM, checkpoint: Checkpoint, dtype: torch.dtype | None, encoding: Encoding | None
) -> list[_Entry]:
    """All tensors of the files, in the model's order."""
    plan = list[_Entry]()
    carried, pieces, parts_held = checkpoint.carried(model), stored_pieces(model), parts(model)
    embedding = pieces[model.vocabulary_parameters[0]][0].name
    heads = sorted(name for name in carried if name.endswith(TIED_HEADS)) if model.is_tied else []
    for own_name in stored_tensors(model):
        for piece in pieces[own_name]:
            shape = piece.stored(piece.region(parts_held[own_name].whole)).shape
            saved_as = dtype or checkpoint.tensors[piece.name].dtype
            if encoding is not None and piece.name in encoding.names:
                described = encoding.described(piece.name, shape)
                plan += [_Entry(name, *said, own_name, piece, piece.name) for name, said in described.items()]
                continue
            plan.append(_Entry(piece.name, shape, saved_as, own_name, piece))
            if piece.name == embedding:
                plan += [_Entry(head, shape, saved_as, own_name, piece) for head in heads]
    for name in sorted(carried - set(heads)):
        header = checkpoint.tensors[name]
        saved_as = dtype if dtype is not None and header.dtype.is_floating_point else header.dtype
        plan.append(_Entry(name, header.shape, saved_as))
    return plan


def _bytes_a_file(plan: Sequence[_Entry], max_bytes: int, num_ranks: int) -> int:
    """Bytes of a file at most, so that every rank has some to write, unless that makes them small."""
    if num_ranks == 1:
        return max_bytes
    share = -(-sum(entry.num_bytes for entry in plan) // num_ranks)
    return min(max_bytes, max(share, MIN_SHARD_BYTES))


def _files(plan: Sequence[_Entry], max_bytes: int) -> dict[str, list[_Entry]]:
    """The files, by name, and what is in each."""
    files, num_bytes = [list[_Entry]()], 0
    for entry in plan:
        if files[-1] and num_bytes + entry.num_bytes > max_bytes:
            files.append([])
            num_bytes = 0
        files[-1].append(entry)
        num_bytes += entry.num_bytes
    if len(files) == 1:
        return {SINGLE: files[0]}
    return {f"model-{number:05}-of-{len(files):05}{SAFETENSORS}": file for number, file in enumerate(files, start=1)}


class _Writer:
    """Writes files, as many at a time as there are ranks, each on one of them (`writing_rank`)."""

    def __init__(
        self,
        folder: Path,
        checkpoint: Checkpoint,
        values: Callable[[str, Tensor], Tensor] | None,
        held: Held,
        encoding: Encoding | None,
    ) -> None:
        self._folder, self._checkpoint, self._values, self._held = folder, checkpoint, values, held
        self._encoding, self._encoded = encoding, dict[str, Tensor]()
        self._needs_held: Callable[[str], bool] = getattr(values, "needs_held", lambda name: True)
        self._made: tuple[str, Tensor] | None = None
        self._scratch = Scratch()

    def write(self, files: Mapping[str, Sequence[_Entry]]) -> None:
        """All files."""
        names, size = list(files), self._held.peers.size
        for first in range(0, len(names), size):
            self._write_together({name: files[name] for name in names[first : first + size]})

    def _write_together(self, files: Mapping[str, Sequence[_Entry]]) -> None:
        """Files of different ranks: a tensor of each in turn, so that none waits for another to be through."""
        peers, attempt = self._held.peers, self._held.attempt
        mine = next((name for name in files if writing_rank(name, peers.size) == peers.rank), None)
        described = {entry.name: (entry.shape, entry.dtype) for entry in files[mine]} if mine else {}
        file = attempt(TensorWriter, self._folder / mine, described, {"format": "pt"}) if mine else None
        before = dict[str, str | None]()
        for turn in zip_longest(*files.values()):
            for name, entry in zip(files, turn, strict=True):
                if entry is not None:
                    is_next = entry.own_name == before.get(name, "")
                    tensor = self._made_at(writing_rank(name, peers.size), entry, is_next)
                    before[name] = entry.own_name
                    if file is not None and name == mine:
                        attempt(self._write_one, file, entry, tensor)
                    del tensor  # one at a time is in memory
        self._made = None
        if file is not None:
            attempt(file.close)
            file.abandon()

    def _made_at(self, at: int, entry: _Entry, is_next: bool) -> Tensor | None:
        """On the rank that writes it, an entry's tensor.

        Args:
            is_next: the entry before in this file came from the same parameter, so `values` need not be called again.
        """
        held, own_name, piece = self._held, entry.own_name, entry.piece
        if own_name is None or piece is None:
            return held.attempt(self._carried, entry) if held.peers.rank == at else None
        if self._values is None:
            region = piece.region(held.parts[own_name].whole)
            # What is quantised is quantised from all that is held of it.
            dtype = None if entry.encoded else entry.dtype
            return held.put_together(own_name, at, region=region, dtype=dtype, scratch=self._scratch)
        if not is_next:
            given = held.put_together(own_name, at) if self._needs_held(own_name) else held.tensors[own_name]
            if held.peers.rank == at:
                value = held.attempt(self._values, own_name, given)
                self._made = None if value is None else (own_name, value)
        if held.peers.rank != at or self._made is None:
            return None
        assert self._made[0] == own_name
        return self._made[1][piece.index] if piece.index else self._made[1]

    def _carried(self, entry: _Entry) -> Tensor:
        return self._checkpoint.weights.read(entry.name).to(entry.dtype)

    def _write_one(self, file: TensorWriter, entry: _Entry, tensor: Tensor) -> None:
        if entry.encoded is not None:
            file.write(entry.name, self._encode(entry, entry.encoded, tensor))
            return
        saved = tensor.detach().to(device="cpu", dtype=entry.dtype).reshape(entry.shape)
        if self._values is not None and entry.own_name is not None and not saved.isfinite().all():
            raise CheckpointError(_why_not_finite(entry.name, tensor, saved.dtype), path=self._checkpoint.path)
        file.write(entry.name, saved)

    def _encode(self, entry: _Entry, name: str, tensor: Tensor) -> Tensor:
        """One of the tensors that a quantised one becomes; the others are kept until they are written."""
        if entry.name not in self._encoded:
            assert self._encoding is not None
            try:
                self._encoded = self._encoding.encode(name, tensor.detach().cpu())
            except CheckpointError as error:
                raise CheckpointError(f"'{name}': {error.problem}", path=self._checkpoint.path) from error
        return self._encoded.pop(entry.name)


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


def save_rest(
    folder: Path,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
    *,
    files: Mapping[str, Sequence[_Entry]] = MappingProxyType({}),
    encoding: Encoding | None = None,
) -> None:
    """Write everything that is no weight: config, tokenizer, template, what lay beside; an index of several files.

    Args:
        dtype: of the weights, for the config; None: the checkpoint's.
    """
    if len(files) > 1:
        total = sum(entry.num_bytes for entries in files.values() for entry in entries)
        weight_map = {entry.name: name for name, entries in files.items() for entry in entries}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = _honest_config(checkpoint, dtype)
    if encoding is not None:
        config["quantization_config"] = encoding.config(dtype or checkpoint.held_dtype)
    _write_json(folder / "config.json", config)
    save_text_files(folder, checkpoint)
    if checkpoint.path.is_dir():
        _carry_over(checkpoint.path, folder)


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


def masters(model: CausalLM, checkpoint: Checkpoint, held: Held) -> dict[str, Tensor]:
    """What this rank holds of the parameters that the model's files would round, by name: a resume needs it besides."""
    pieces = stored_pieces(model)
    rounded: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        dtype = checkpoint.tensors[pieces[name][0].name].dtype
        if torch.promote_types(dtype, parameter.dtype) != dtype:
            rounded[name] = held.tensors[name]
    return rounded
