"""The loop's data: micro-batches of one optimizer step after the other, and the exact place in them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Iterable, Iterator
from dataclasses import asdict, dataclass
from types import TracebackType

from torchtune.data.batch import Batch, collate
from torchtune.data.plan import WINDOW_IN_MEMORY, WINDOW_TOKENISED_AHEAD, Pack, Plan, Window, WindowSize, deal
from torchtune.data.sampler import RowSampler
from torchtune.data.sharing import Share, ShareSize, in_order, shares
from torchtune.data.workers import Ahead, Source, read_samples
from torchtune.distributed.process_group import place_in_group

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """A place between two optimizer steps; the same for every number of ranks.

    Attributes:
        epoch: from 0.
        window: the window's first row, as a place in the epoch's order.
        packs_consumed: packs of that window that are gone.
        rows_consumed: rows of the epoch that are gone.
    """

    epoch: int
    window: int = 0
    packs_consumed: int = 0
    rows_consumed: int = 0


class DataLoader:
    """Iterates over an epoch: for each optimizer step the list of this rank's micro-batches.

    An optimizer step takes the next world_size x gradient_accumulation_steps x batch_size packs (or samples,
    when not packed); the epoch's last step takes what is left, with fewer micro-batches, and none is dropped.
    Every rank has the same number of micro-batches in a step.

    The next window of rows is read while the loop trains: by a thread, or by `num_workers` processes where the
    rows are not all in memory. Packs are planned from all rows of a window; each rank then keeps only its own.
    Ranks that iterate together tokenise each row once (sharing.py).

    A row that can't be trained on raises its DataError where the loop asks for the first step of that row's
    window; the steps before it have been given out, and `state_dict` is the place after them.

    Args:
        source: gives each row's samples.
        sampler: gives the order of the rows.
        batch_size: packs (or samples) of a micro-batch, at most.
        gradient_accumulation_steps: micro-batches of an optimizer step, at most.
        max_seq_len: tokens of a pack at most.
        packed: several samples a pack, or one.
        seed: with epoch and window it decides the order of packs.
        rank, world_size: which share of a step is given out here; ranks that share a row's tokens or a layer
            have the same.
        together: all ranks of the process group iterate over such a loader side by side, and so each reads a
            part of the rows that are not in memory. By default it reads them all.
        head_cost: what the model's head adds for a trained token, where a token's way through the layers takes 1;
            ranks are dealt micro-batches that take as long.
        num_workers: processes that tokenise; 0 means a thread.
        window: rows that are packed together; None chooses.
    """

    def __init__(
        self,
        source: Source,
        sampler: RowSampler,
        *,
        batch_size: int,
        gradient_accumulation_steps: int,
        max_seq_len: int,
        packed: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        together: bool = False,
        head_cost: float = 0.0,
        num_workers: int = 0,
        window: WindowSize | None = None,
    ) -> None:
        self.source = source
        self.sampler = sampler
        self.batch_size = batch_size
        self.packs_per_step = world_size * gradient_accumulation_steps * batch_size
        self.max_seq_len = max_seq_len
        self.packed = packed
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.head_cost = head_cost
        # What lies in memory needs nobody to make it.
        self.num_workers = 0 if source.all_checked else num_workers
        self._window = window or (WINDOW_IN_MEMORY if source.all_checked else WINDOW_TOKENISED_AHEAD)
        self._reader, self._num_readers = place_in_group() if together and not source.all_checked else (0, 1)
        self._position = Position(sampler.epoch)
        self._resume_from: Position | None = None
        self._ahead: Ahead[Share] | None = None
        self._row_lengths: list[tuple[int, ...]] | None = None

    @property
    def rows_consumed(self) -> int:
        """Rows of the current epoch that the steps given out so far have used up."""
        return self._position.rows_consumed

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return self.sampler.num_rows

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next loop. The place loaded by `load_state_dict` is kept if it is in that epoch."""
        self.sampler.set_epoch(epoch)
        if epoch != self._position.epoch:
            self._resume_from = None
            self._position = Position(epoch)

    def state_dict(self) -> dict[str, int]:
        """The place after the last step given to the loop; what is read ahead does not count."""
        return asdict(self._position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next loop begin with the step after that place."""
        self.close()
        self._position = self._resume_from = Position(**state)
        self.sampler.set_epoch(self._position.epoch)

    def num_steps_per_epoch(self, epoch: int) -> int | None:
        """Optimizer steps of a whole epoch, or None where that is only known once all rows are tokenised."""
        if not self.source.all_checked:
            return None
        if self._row_lengths is None:
            samples = (self.source.samples_of(row) for row in range(self.source.num_rows))
            self._row_lengths = [tuple(len(sample.input_ids) for sample in row) for row in samples]
        lengths = (self._row_lengths[row] for row in self.sampler.order(epoch).tolist())
        return -(-self._plan(epoch).num_packs(lengths) // self.packs_per_step)

    def __iter__(self) -> Iterator[list[Batch]]:
        """The steps of the current epoch, from the place that was loaded, else from the epoch's beginning."""
        self.close()
        self._position = Position(self.sampler.epoch)
        if self._resume_from is not None and self._resume_from.epoch == self.sampler.epoch:
            self._position = self._resume_from
        self._resume_from = None
        ahead = self._ahead = self._read_ahead(self._position)
        try:
            for packs, after in self._steps(self._windows(ahead, self._position), self._position):
                dealt = deal(packs, world_size=self.world_size, batch_size=self.batch_size, head_cost=self.head_cost)
                batches = [collate([pack.samples for pack in micro_batch]) for micro_batch in dealt[self.rank]]
                self._position = after  # before it is given out: the loop saves while it holds the step
                yield batches
                if self._ahead is not ahead:
                    raise RuntimeError("the loader was closed, or iterated anew, while this loop went on")
            self._position = Position(self._position.epoch, self.num_rows, 0, self.num_rows)
        finally:
            ahead.close()
            if self._ahead is ahead:
                self._ahead = None

    def close(self) -> None:
        """End the thread and the processes that read ahead. The loader can be iterated again."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def __enter__(self) -> DataLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _plan(self, epoch: int) -> Plan:
        return Plan(self.seed, epoch, self.max_seq_len, self.packed, self.sampler.shuffle, self._window)

    def _read_ahead(self, start: Position) -> Ahead[Share]:
        size = ShareSize.of(self._window, self.max_seq_len, self._num_readers)

        def own_shares(stop: threading.Event) -> Generator[Share, None, None]:
            rows = self.sampler.order(start.epoch)[start.window :]
            own = rows[self._reader :: self._num_readers]
            samples = read_samples(self.source, own, stop, num_workers=self.num_workers)
            try:
                yield from shares(samples, size)
            finally:
                samples.close()  # ends the processes

        return Ahead(own_shares, size.per_window)

    def _windows(self, ahead: Ahead[Share], start: Position) -> Iterator[Window]:
        rows = in_order(ahead, self.num_rows - start.window, self._num_readers)
        return self._plan(start.epoch).windows(rows, start.window)

    def _steps(self, windows: Iterable[Window], start: Position) -> Iterator[tuple[list[Pack], Position]]:
        """The packs of each step on all ranks, and the place after it."""
        step: list[Pack] = []
        place = start
        for window in windows:
            for pack, place in _places(window, start):
                step.append(pack)
                if len(step) == self.packs_per_step:
                    yield step, place
                    step = []
        if step:
            yield step, place


def _places(window: Window, start: Position) -> Iterator[tuple[Pack, Position]]:
    """The packs of `window` that come after `start`, each with the place behind it."""
    skip = start.packs_consumed if window.start == start.window else 0
    if skip >= max(len(window.packs), 1):
        logger.warning(
            "the saved place is behind pack %d of a window that now has %d: the data or the keys that pack it "
            "have changed; going on with the next window",
            skip,
            len(window.packs),
        )
    num_rows = window.start
    for index, pack in enumerate(window.packs, start=1):
        num_rows += pack.num_rows
        if index == len(window.packs):
            # Not "behind the last pack of this window", which would have to be tokenised to be skipped.
            place = Position(start.epoch, window.end, 0, window.end)
        else:
            place = Position(start.epoch, window.start, index, num_rows)
        if index > skip:
            yield pack, place
