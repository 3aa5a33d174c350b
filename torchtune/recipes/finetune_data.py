"""The data of a fine-tune: the rows to train on and those held out, proven before a weight is read."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from torchtune.checkpoint.open import Checkpoint
from torchtune.data.dataset import Dataset, open_dataset
from torchtune.data.loader import DataLoader
from torchtune.data.options import DatasetOptions
from torchtune.data.prepare import Prepared
from torchtune.data.rows import Rows
from torchtune.data.sampler import RowSampler
from torchtune.distributed.process_group import rank, world_size
from torchtune.errors import ConfigError
from torchtune.recipes.choices import Batching
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
        data = FinetuneData(check(dataset), check(open_one(params.eval_dataset)))
    elif params.eval_fraction:
        train, held_out = _split(len(dataset.rows), params.eval_fraction, seed)
        data = FinetuneData(check(dataset, dataset.rows.select(train)), check(dataset, dataset.rows.select(held_out)))
    else:
        data = FinetuneData(check(dataset), None)
    _stop_where_turns_end(data.train, checkpoint, tokenizer)
    return data


def deal(
    data: FinetuneData, params: FinetuneParams, batching: Batching, *, seed: int, until: ExitStack
) -> tuple[RowSampler, DataLoader, DataLoader | None]:
    """The order of the rows, the loader of training steps, and that of the held-out data, if there is any.

    Args:
        until: closes the loaders.
    """

    def loader(source: Prepared, sampler: RowSampler) -> DataLoader:
        made = DataLoader(
            source,
            sampler,
            batch_size=batching.batch_size,
            gradient_accumulation_steps=batching.gradient_accumulation_steps,
            max_seq_len=batching.max_seq_len,
            packed=params.packed,
            seed=seed,
            rank=rank(),
            world_size=world_size(),
            num_workers=params.num_workers,
        )
        return until.enter_context(made)

    sampler = RowSampler(data.train.num_rows, seed=seed, shuffle=params.shuffle)
    held_out = None
    if data.held_out is not None:
        held_out = loader(data.held_out, RowSampler(data.held_out.num_rows, seed=seed, shuffle=False))
    return sampler, loader(data.train, sampler), held_out


def _stop_where_turns_end(train: Prepared, checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """Make what ends a trained turn stop generation too, in what is saved, and say so."""
    ends = train.report.end_ids & set(tokenizer.added_tokens.values())
    for token in checkpoint.add_stop_ids(ends):
        name = tokenizer.id_to_token(token)
        say(f"generation_config: '{name}' ends a trained turn and is added to what stops")


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
