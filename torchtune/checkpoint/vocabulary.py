"""A checkpoint with more tokens than it came with: its tokenizer, embedding and head grown before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from torchtune.checkpoint.headers import TensorHeader, WeightSource
from torchtune.checkpoint.open import TIED_HEADS, Checkpoint
from torchtune.distributed.part import Part
from torchtune.errors import CheckpointError
from torchtune.models.build import build_model
from torchtune.modules.stored import fit_layouts, stored_pieces
from torchtune.tokenizers.grow import add_tokens


def grow_vocabulary(
    checkpoint: Checkpoint, new_tokens: Sequence[str] = (), *, pad_to_multiple_of: int | None = None
) -> Checkpoint:
    """The checkpoint with tokens added; what is loaded and saved from it has them.

    Rows of tokens that the checkpoint had none for are the mean of the rows of those that it had. Source of the
    rule: Hewitt, 2021 (https://nlp.stanford.edu/~johnhew/vocab-expansion.html).

    Args:
        new_tokens: texts that are to be one token each.
        pad_to_multiple_of: the number of rows is a multiple of this, for the sake of matrix products.
    Raises:
        CheckpointError: a new token is there already, or is none.
    """
    num_known = checkpoint.tokenizer().vocab_size
    files = checkpoint.files
    if new_tokens:
        # Not special: rows may say them, and decoding shows them.
        files = add_tokens(files, new_tokens, special=False, config=checkpoint.config)
    grown = dataclasses.replace(checkpoint, files=files, config=dict(checkpoint.config))
    if not checkpoint.tensors:  # opened without weights
        return grown
    names = _vocabulary_tensors(checkpoint)
    num_rows = checkpoint.tensors[names[0]].shape[0]
    num_needed = max(num_rows, grown.tokenizer().vocab_size)
    if pad_to_multiple_of:
        num_needed = -(-num_needed // pad_to_multiple_of) * pad_to_multiple_of
    known = min(num_known, num_rows)
    new = torch.tensor([*range(known, grown.tokenizer().vocab_size), *range(num_rows, num_needed)]).unique()
    grown.weights = _GrownWeights(checkpoint.weights, names, num_rows=num_needed, num_known=known, new=new)
    _set_vocab_size(grown.config, num_rows, num_needed)
    return grown


class _GrownWeights(WeightSource):
    """A source whose vocabulary tensors have more rows."""

    def __init__(
        self, source: WeightSource, names: Sequence[str], *, num_rows: int, num_known: int, new: torch.Tensor
    ) -> None:
        self._source, self._names, self._num_rows = source, set(names), num_rows
        self._num_known, self._new = num_known, new
        self.headers = {name: self._header(name, header) for name, header in source.headers.items()}

    def read(self, name: str) -> torch.Tensor:
        tensor = self._source.read(name)
        if name not in self._names:
            return tensor
        grown = tensor.new_empty(self._num_rows, *tensor.shape[1:])
        grown[: len(tensor)] = tensor
        # In float64: a sum of a hundred thousand rows is no sum in half precision.
        mean = tensor[: self._num_known].mean(0, dtype=torch.float64)
        grown[self._new] = mean.to(tensor.dtype)
        return grown

    def read_part(self, name: str, part: Part) -> torch.Tensor:
        return super().read_part(name, part) if name in self._names else self._source.read_part(name, part)

    def close(self) -> None:
        self._source.close()

    def _header(self, name: str, header: TensorHeader) -> TensorHeader:
        if name not in self._names:
            return header
        return dataclasses.replace(header, shape=(self._num_rows, *header.shape[1:]))


def _vocabulary_tensors(checkpoint: Checkpoint) -> list[str]:
    """The stored names of the embedding and, where there is one, the head."""
    with torch.device("meta"):
        model = build_model(checkpoint.config)
    fit_layouts(model, checkpoint.tensors)
    embedding, *head = model.vocabulary_parameters
    pieces = stored_pieces(model)
    names = [pieces[name][0].name for name in (embedding, *head)]
    names += [name for name in checkpoint.carried(model) if name.endswith(TIED_HEADS)]
    if missing := [name for name in names if name not in checkpoint.tensors]:
        raise CheckpointError(f"tensor '{missing[0]}' is missing", path=checkpoint.path)
    return names


def _set_vocab_size(config: dict[str, Any], before: int, after: int) -> None:
    if "text_config" in config:
        config["text_config"] = {**config["text_config"], "vocab_size": after}
    if config.get("vocab_size", before) == before and ("vocab_size" in config or "text_config" not in config):
        config["vocab_size"] = after
