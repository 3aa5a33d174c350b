"""What a forward pass is given: documents one after the other on a flat axis, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune.data.sample import Sample
from torchtune.modules.documents import Documents

NOT_TRAINED = -100
DUMMY_ID = 0


@dataclass(frozen=True)
class Batch:
    """One micro-batch. T: its tokens, all documents together.

    Dummies may stand behind the tokens, where their number must be a multiple of something: they predict nothing and
    count nowhere.

    Attributes:
        input_ids: the tokens, int64 [T].
        labels: the token that position t must predict, int64 [T]; -100 where none is trained. Already
            shifted, within each document.
        trained: the positions whose label is not -100, int64 [num_trained]; found on the host, where asking
            costs no wait for a device.
        documents: where each document begins, and its positions.
        num_trained: labels that are not -100.
        num_tokens: tokens of the data, without dummies.
        sources: where each document comes from, `chats.jsonl:12`.
        rows: the data set's row of each document.
    """

    input_ids: Tensor
    labels: Tensor
    trained: Tensor
    documents: Documents
    num_trained: int
    num_tokens: int
    sources: tuple[str, ...]
    rows: tuple[int, ...]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        # A blocking copy would wait for all that the device still has to do.
        non_blocking = torch.device(device).type != "cpu"
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            trained=self.trained.to(device, non_blocking=non_blocking),
            documents=self.documents.to(device),
        )

    def padded_to(self, multiple: int) -> Batch:
        """The same batch with dummies behind, so that its tokens are a multiple of so many."""
        num_dummy = -len(self.input_ids) % multiple
        if num_dummy == 0:
            return self
        return replace(
            self,
            input_ids=F.pad(self.input_ids, (0, num_dummy), value=DUMMY_ID),
            labels=F.pad(self.labels, (0, num_dummy), value=NOT_TRAINED),
            documents=self.documents.padded(num_dummy),
        )


def collate(rows: Sequence[Sequence[Sample]]) -> Batch:
    """The samples of `rows` as one batch, each a document of its own; with no row, a dummy batch.

    A rank for which no row is left still runs its forward and backward, since the others wait for it:
    a dummy batch is one token that predicts nothing and counts nothing.
    """
    samples = [sample for row in rows for sample in row]
    if not samples:
        return _dummy_batch()
    lengths = [len(sample.input_ids) for sample in samples]
    input_ids = np.concatenate([sample.input_ids for sample in samples]).astype(np.int64)
    trained = np.concatenate([sample.trained for sample in samples])
    # A sample's first token is never trained, so no label comes from another document than its position.
    labels = np.full_like(input_ids, NOT_TRAINED)
    np.copyto(labels[:-1], input_ids[1:], where=trained[1:])
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        trained=torch.from_numpy(np.flatnonzero(labels != NOT_TRAINED)),
        documents=Documents.from_lengths(lengths),
        num_trained=int(np.count_nonzero(trained)),
        num_tokens=len(input_ids),
        sources=tuple(sample.source for sample in samples),
        rows=tuple(sample.row for sample in samples),
    )


def _dummy_batch() -> Batch:
    return Batch(
        input_ids=torch.full((1,), DUMMY_ID),
        labels=torch.full((1,), NOT_TRAINED),
        trained=torch.empty(0, dtype=torch.int64),
        documents=Documents.from_lengths([]).padded(1),
        num_trained=0,
        num_tokens=0,
        sources=(),
        rows=(),
    )
