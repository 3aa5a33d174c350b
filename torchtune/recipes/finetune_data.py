"""The data of a fine-tune: the rows to train on and those held out, proven before a weight is read."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

import numpy as np

from torchtune.checkpoint.open import Checkpoint
from torchtune.checkpoint.training_state import TrainingState
from torchtune.config.component import COMPONENT, find_callable
from torchtune.data.dataset import Dataset, open_dataset
from torchtune.data.loader import DataLoader
from torchtune.data.mix import Mix, Share
from torchtune.data.options import DatasetOptions
from torchtune.data.prepare import Prepared
from torchtune.data.rows import Rows, Transform
from torchtune.data.sampler import RowSampler
from torchtune.distributed.mesh import Mesh
from torchtune.errors import ConfigError
from torchtune.recipes import choices
from torchtune.recipes.choices import Batching
from torchtune.recipes.params import FinetuneParams
from torchtune.recipes.run_state import RunState
from torchtune.tokenizers.tokenizer import Tokenizer
from torchtune.training.progress import say

SECONDS_BETWEEN_LINES = 2.0


@dataclass(frozen=True)
class FinetuneData:
    """What is trained on, and what is held out, if anything."""

    train: Prepared | Mix
    held_out: Prepared | Mix | None


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

    def open_all(options: DatasetOptions) -> list[Dataset]:
        return [
            open_dataset(
                source,
                tokenizer,
                checkpoint.chat_template,
                stop_tokens=stop_tokens,
                now=now,
                transform=build_transform(source.transform),
            )
            for source in options.sources
        ]

    def check(datasets: list[Dataset], options: DatasetOptions, rows: list[Rows]) -> Prepared | Mix:
        checked = [
            dataset.prepare(chosen, max_seq_len=max_seq_len, together=True, progress=_Lines(dataset.rows.name))
            for dataset, chosen in zip(datasets, rows, strict=True)
        ]
        if not options.mix:
            return checked[0]
        return Mix(checked, [Share(part.weight, part.tokens) for part in options.mix])

    datasets = open_all(params.dataset)
    rows = [dataset.rows for dataset in datasets]
    held_out = None
    if params.eval_dataset is not None:
        others = open_all(params.eval_dataset)
        held_out = check(others, params.eval_dataset, [dataset.rows for dataset in others])
    elif params.eval_fraction:
        splits = [_split(len(each), params.eval_fraction, seed) for each in rows]
        held_out = check(
            datasets, params.dataset, [each.select(out) for each, (_, out) in zip(rows, splits, strict=True)]
        )
        rows = [each.select(kept) for each, (kept, _) in zip(rows, splits, strict=True)]
    data = FinetuneData(check(datasets, params.dataset, rows), held_out)
    _stop_where_turns_end(data.train, checkpoint, tokenizer)
    return data


def build_transform(component: dict[str, Any] | None) -> Transform | None:
    """What `dataset.transform` names: a function with its keywords bound, or an object of a class.

    Raises:
        ConfigError: it leads nowhere.
    """
    if component is None:
        return None
    target = find_callable(component[COMPONENT])
    keywords = {name: value for name, value in component.items() if name != COMPONENT}
    return target(**keywords) if isinstance(target, type) else partial(target, **keywords)


@dataclass(frozen=True)
class FinetuneLoaders:
    """What the loop reads.

    Attributes:
        batching: how rows become steps.
        sampler: the order of the rows.
        train: the steps.
        held_out: those of the held-out data, if there is any.
    """

    batching: Batching
    sampler: RowSampler
    train: DataLoader
    held_out: DataLoader | None


def open_loaders(
    params: FinetuneParams,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    state: RunState,
    saved: TrainingState | None,
    *,
    mesh: Mesh,
    until: ExitStack,
) -> FinetuneLoaders:
    """Prove the data, decide how it is dealt to steps, and go to the place that a resumed run is at.

    Args:
        state: has the seed, and the time that templates are told.
        saved: what the run is resumed from, if it is.
        mesh: rows are dealt along its data axis; ranks that share rows read the same.
        until: closes the loaders.
    Raises:
        DataError: rows that can't be trained on, with file, line and remedy.
    """
    limit = choices.longest_allowed(params, checkpoint.config)
    data = prepare_data(params, checkpoint, tokenizer, max_seq_len=limit, seed=state.seed, now=state.started)
    say(str(data.train.report))
    batching = choices.choose_batching(params, data.train.report, limit=limit, world_size=mesh.data.size)
    costs = choices.head_cost(checkpoint)
    sampler, train, held_out = _deal(data, params, batching, seed=state.seed, head_cost=costs, mesh=mesh, until=until)
    if saved is not None and state.steps_in_epoch:
        train.load_state_dict(saved.state["dataloader"])
    return FinetuneLoaders(batching, sampler, train, held_out)


def _deal(
    data: FinetuneData,
    params: FinetuneParams,
    batching: Batching,
    *,
    seed: int,
    head_cost: float,
    mesh: Mesh,
    until: ExitStack,
) -> tuple[RowSampler, DataLoader, DataLoader | None]:

    def loader(source: Prepared | Mix, sampler: RowSampler) -> DataLoader:
        limit = max(batching.max_seq_len, source.report.longest)  # held-out samples may be longer than all others
        made = DataLoader(
            source.with_max_seq_len(limit),
            sampler,
            batch_size=batching.batch_size,
            gradient_accumulation_steps=batching.gradient_accumulation_steps,
            max_seq_len=limit,
            packed=params.packed,
            seed=seed,
            rank=mesh.data.rank,
            world_size=mesh.data.size,
            together=True,
            head_cost=head_cost,
            num_workers=params.num_workers,
        )
        return until.enter_context(made)

    sampler = data.train.sampler(seed=seed, shuffle=params.shuffle)
    held_out = None
    if data.held_out is not None:
        held_out = loader(data.held_out, RowSampler(data.held_out.num_rows, seed=seed, shuffle=False))
    return sampler, loader(data.train, sampler), held_out


def _stop_where_turns_end(train: Prepared | Mix, checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
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
