"""The data of a fine-tune: the rows to train on and those held out, proven before a weight is read."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from torchtune.checkpoint.open import Checkpoint
from torchtune.data.dataset import Dataset, open_dataset
from torchtune.data.options import DatasetOptions
from torchtune.data.prepare import Prepared
from torchtune.data.rows import Rows
from torchtune.errors import ConfigError
from torchtune.recipes.params import FinetuneParams
from torchtune.tokenizers.tokenizer import Tokenizer
from torchtune.training.progress import say

SECONDS_BETWEEN_LINES = 2.0


@dataclass(frozen=True)
class FinetuneData:
    """What is trained on, and what is held out, if anything."""

    train: Prepared
    held_out: Prepared | None


def prepare_data(
    params: FinetuneParams,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    *,
    max_seq_len: int,
    seed: int,
    now: datetime,
) -> FinetuneData:
    """Open, recognise, render and check the data sets.

    Args:
        max_seq_len: tokens of a sample at most.
        seed: decides which rows `eval_fraction` holds out.
        now: the time that templates are told.
    Raises:
        DataError: rows that can't be trained on, with file, line and remedy.
    """
    stop_tokens = [token for token in map(tokenizer.id_to_token, checkpoint.stop_ids) if token]

    def open_one(options: DatasetOptions) -> Dataset:
        return open_dataset(options, tokenizer, checkpoint.chat_template, stop_tokens=stop_tokens, now=now)

    def check(dataset: Dataset, rows: Rows | None = None) -> Prepared:
        return dataset.prepare(rows, max_seq_len=max_seq_len, progress=_Lines(dataset.rows.name))

    dataset = open_one(params.dataset)
    if params.eval_dataset is not None:
        return FinetuneData(check(dataset), check(open_one(params.eval_dataset)))
    if not params.eval_fraction:
        return FinetuneData(check(dataset), None)
    train, held_out = _split(len(dataset.rows), params.eval_fraction, seed)
    return FinetuneData(check(dataset, dataset.rows.select(train)), check(dataset, dataset.rows.select(held_out)))


def _split(num_rows: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows to hold out, each in file order."""
    num_held_out = max(round(num_rows * fraction), 1)
    if num_held_out >= num_rows:
        raise ConfigError(f"{fraction} of {num_rows} rows leaves none to train on", key="eval_fraction")
    order = np.random.default_rng([seed, num_rows]).permutation(num_rows)
    return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])


class _Lines:
    """Says how far the check has come, when it takes more than a moment."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            say(f"{self._name}: checked {done:,} of {total:,} rows", sys.stderr)
