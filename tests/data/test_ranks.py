"""Data over ranks: every row once an epoch, whoever reads it, trains it or goes on with it."""

import itertools
import json
import multiprocessing
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from tests.data.made_samples import MadeSource, random_lengths
from torchtune.data.dataset import open_dataset
from torchtune.data.loader import DataLoader
from torchtune.data.mix import MixSampler
from torchtune.data.options import DatasetOptions
from torchtune.data.plan import WindowSize
from torchtune.data.sampler import RowSampler
from torchtune.data.sharing import SHARES_PER_WINDOW, Share, ShareSize, in_order, shares
from torchtune.errors import DataError

SMALL = WindowSize(num_rows=24, num_tokens=200, packs=1, first=6)
LENGTHS = random_lengths(61, longest=32)
PARTS, WANTED = [20, 41], [33, 30]  # a mix: the first part comes more than once an epoch, the second not whole


def sampler_of(kind):
    if kind == "mix":
        return MixSampler(PARTS, WANTED, seed=5, shuffle=True)
    return RowSampler(len(LENGTHS), seed=5, shuffle=kind == "shuffled")


def loader(kind="shuffled", source=None, **options):
    source = source or MadeSource(LENGTHS)
    return DataLoader(source, sampler_of(kind), max_seq_len=32, seed=5, window=SMALL, **options)


def trained(step):
    """The (row, part of the row) of each document in a step's micro-batches, from its first token."""
    found = Counter()
    for batch in step:
        begins = [0, *itertools.accumulate(batch.documents.lengths)][:-1] if batch.rows else []
        found.update(
            (int(batch.input_ids[begin]) // 10_000, int(batch.input_ids[begin]) // 1_000 % 10) for begin in begins
        )
    return found


def due(kind, epoch=0):
    """The same of an epoch, from the sampler's order alone."""
    rows = sampler_of(kind).order(epoch).tolist()
    return Counter((row, part) for row in rows for part in range(len(LENGTHS[row])))


def run(num_ranks, accumulation, *, state=None, stop_after=None, **options):
    """What each step trains on over all ranks, its micro-batches by rank, and the place behind it."""
    options |= {"world_size": num_ranks, "gradient_accumulation_steps": accumulation}
    ranks = [loader(rank=rank, **options) for rank in range(num_ranks)]
    for data in ranks if state else ():
        data.load_state_dict(json.loads(json.dumps(state)))
    found = []
    for steps in zip(*ranks, strict=True):
        places = [data.state_dict() for data in ranks]
        assert places == places[:1] * num_ranks
        found.append(
            SimpleNamespace(trained=sum(map(trained, steps), Counter()), num=[*map(len, steps)], place=places[0])
        )
        if len(found) == stop_after:
            break
    for data in ranks:
        data.close()
    return found


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["shuffled", "in order", "mix"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_steps_are_those_of_one_rank(kind, batch_size, packed):
    """For each way to write a product as ranks x accumulation: every row as often as it is due, the same in each
    step, and as many micro-batches on every rank, uneven tails included."""
    for product in (1, 2, 4, 6, 12):
        options = {"kind": kind, "packed": packed, "batch_size": batch_size}
        alone = run(1, product, **options)
        assert sum((step.trained for step in alone), Counter()) == due(kind)
        for num_ranks in (n for n in (2, 3, 4, 6) if product % n == 0):
            steps = run(num_ranks, product // num_ranks, **options)
            assert [step.trained for step in steps] == [step.trained for step in alone]
            assert [step.place for step in steps] == [step.place for step in alone]
            assert all(len(set(step.num)) == 1 and step.num[0] <= product // num_ranks for step in steps)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["shuffled", "mix"])
def test_resumed_on_any_other_number_of_ranks_the_rest_is_trained(kind, packed):
    """From each step on; where ranks x accumulation is the same, step for step."""
    options = {"kind": kind, "packed": packed, "batch_size": 2}
    unbroken = run(4, 1, **options)
    assert len(unbroken) > 4
    for done, saved in enumerate(unbroken[:-1], start=1):
        before = sum((step.trained for step in unbroken[:done]), Counter())
        for num_ranks, accumulation in ((1, 4), (2, 2), (2, 1), (3, 1), (5, 2)):
            rest = run(num_ranks, accumulation, state=saved.place, **options)
            assert before + sum((step.trained for step in rest), Counter()) == due(kind)
            if num_ranks * accumulation == 4:
                assert [step.trained for step in rest] == [step.trained for step in unbroken[done:]]


def test_resumed_again_and_again_on_changing_ranks_no_row_is_lost():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        state, seen = None, Counter()
        while state is None or state["rows_consumed"] < len(LENGTHS):
            num_ranks, accumulation, batch_size = rng.integers(1, 4, 3).tolist()
            options = {"packed": seed % 2 == 0, "batch_size": batch_size}
            steps = run(num_ranks, accumulation, state=state, stop_after=int(rng.integers(1, 4)), **options)
            seen += sum((step.trained for step in steps), Counter())
            state = steps[-1].place
        assert seen == due("shuffled")


# Each row is read by one rank


def reader(rank, num_readers, source, num_rows=None):
    """The shares of one rank, without a process."""
    rows = (source.samples_of(row) for row in range(rank, num_rows or source.num_rows, num_readers))
    return list(shares(rows, ShareSize(num_rows=3, num_tokens=60, per_window=1)))


def test_shares_are_put_in_order(monkeypatch):
    """Ragged ones, since a share is full by rows or by tokens; ranks whose rows are at an end add nothing."""
    source = MadeSource([*LENGTHS, [1] * 9, *[[]] * 20])
    for num_readers in (1, 2, 3, 7, 100):
        own = [reader(rank, num_readers, source) for rank in range(num_readers)]
        turns = itertools.zip_longest(*own, fillvalue=Share())
        monkeypatch.setattr("torchtune.data.sharing.gather_objects", lambda _, turns=turns: list(next(turns)))
        rows = list(in_order(iter(own[0]), source.num_rows, num_readers))
        assert [[sample.input_ids.tolist() for sample in row] for row in rows] == [
            [sample.input_ids.tolist() for sample in source.samples_of(row)] for row in range(source.num_rows)
        ]


@pytest.mark.parametrize("num_readers", [1, 2, 5])
def test_a_bad_row_is_raised_in_its_place(num_readers, monkeypatch):
    for bad_row in (0, 7, 8, 60):
        source = MadeSource(LENGTHS, bad_row=bad_row)
        own = [reader(rank, num_readers, source) for rank in range(num_readers)]
        turns = itertools.zip_longest(*own, fillvalue=Share())
        monkeypatch.setattr("torchtune.data.sharing.gather_objects", lambda _, turns=turns: list(next(turns)))
        rows, seen = in_order(iter(own[0]), source.num_rows, num_readers), []
        with pytest.raises(DataError) as caught:
            seen.extend(rows)
        assert len(seen) == bad_row
        assert caught.value.source == f"made.jsonl:{bad_row + 1}"


@pytest.mark.parametrize("num_readers", [1, 2, 8, 1000])
@pytest.mark.parametrize("window", [WindowSize(), WindowSize(num_rows=20, num_tokens=100, packs=1)])
def test_a_window_is_read_ahead_and_hardly_more(window, num_readers):
    size = ShareSize.of(window, 32, num_readers)
    assert (
        window.num_rows <= size.num_rows * size.per_window * num_readers < window.num_rows + size.num_rows * num_readers
    )
    assert size.per_window <= SHARES_PER_WINDOW


def two_epochs(data):
    """The steps of a rank, and the error that ended them."""
    steps = []
    try:
        for epoch in range(2):
            data.set_epoch(epoch)
            steps.extend([(batch.input_ids.tolist(), batch.rows) for batch in step] for step in data)
    except DataError as error:
        return steps, str(error)
    return steps, None


def on_a_rank(tensor_size, bad_row, options):
    """Two epochs of this rank, read together, and the rows that it was asked for."""
    from torchtune.distributed.process_group import rank, world_size

    # Ranks of tests are daemons, which may not have processes of their own.
    multiprocessing.current_process()._config["daemon"] = False
    source = MadeSource(LENGTHS, all_checked=False, bad_row=bad_row)
    place = {"rank": rank() // tensor_size, "world_size": world_size() // tensor_size}
    return two_epochs(loader(source=source, together=True, **place, **options)), source.asked


def alone(rank, num_ranks, options, bad_row=None):
    """The same of a rank that reads every row itself."""
    source = MadeSource(LENGTHS, all_checked=False, bad_row=bad_row)
    return two_epochs(loader(source=source, rank=rank, world_size=num_ranks, **options))


@pytest.mark.parametrize("kind", ["shuffled", "mix"])
def test_c129_each_row_is_read_by_one_rank(four_ranks, kind):
    """And the steps are those of ranks that read everything."""
    options = {"kind": kind, "packed": True, "batch_size": 2, "gradient_accumulation_steps": 2}
    found = four_ranks.run(on_a_rank, 1, None, options)
    assert [steps for steps, _ in found] == [alone(rank, 4, options) for rank in range(4)]
    asked = Counter(row for _, asked in found for row in asked)
    assert asked == sum((Counter(sampler_of(kind).order(epoch).tolist()) for epoch in (0, 1)), Counter())


def test_ranks_that_share_a_layer_train_the_same_rows(four_ranks):
    """Two data ranks of two tensor ranks: all four read, the two of a data rank get its micro-batches."""
    options = {"packed": True, "batch_size": 2, "gradient_accumulation_steps": 1}
    found = four_ranks.run(on_a_rank, 2, None, options)
    assert [steps for steps, _ in found] == [alone(rank // 2, 2, options) for rank in range(4)]
    assert sum(len(asked) for _, asked in found) == 2 * len(LENGTHS)


def test_ranks_with_workers_read_the_same(two_ranks):
    options = {"packed": False, "batch_size": 2, "gradient_accumulation_steps": 1}
    found = two_ranks.run(on_a_rank, 1, None, {**options, "num_workers": 1})
    assert [steps for steps, _ in found] == [alone(rank, 2, options) for rank in range(2)]


def test_a_bad_row_ends_all_ranks_at_the_same_step(two_ranks):
    """The other rank has not read it and tells it all the same."""
    bad_row = int(sampler_of("shuffled").order(0)[51])
    options = {"packed": True, "batch_size": 1, "gradient_accumulation_steps": 1}
    found = two_ranks.run(on_a_rank, 1, bad_row, options)
    for rank, ((steps, error), _) in enumerate(found):
        assert error == f"made.jsonl:{bad_row + 1}: not an object"
        assert len(steps) > 0
        assert (steps, error) == alone(rank, 2, options, bad_row)


# The check before step 1


def checked(path, checkpoint, together, options):
    """What the check finds: the report, every stored sample, or the error; and how many texts were encoded here."""
    from torchtune.checkpoint.open import open_checkpoint

    opened = open_checkpoint(checkpoint)
    dataset = open_dataset(DatasetOptions(path=path, **options), opened.tokenizer(), opened.chat_template)
    rendered = []
    render = dataset.renderer.render
    dataset.renderer.render = lambda rows: rendered.extend(rows) or render(rows)
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("torchtune.data.prepare.CHUNK_ROWS", 3)
            prepared = dataset.prepare(max_seq_len=60, together=together)
    except DataError as error:
        return str(error), None, len(rendered)
    samples = [(s.input_ids.tolist(), s.trained.tolist(), s.source, s.row) for s in prepared.checked_samples()]
    return prepared.report, samples, len(rendered)


@pytest.mark.parametrize("on_bad_row", ["skip", "error"])
def test_ranks_check_a_file_together(two_ranks, tmp_path, tmp_path_factory, on_bad_row):
    """Each its share, and all find what one finds: samples, counts, what was cut and what is bad."""
    from tests.tiny_checkpoint import save_tiny_checkpoint

    checkpoint = save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    path = tmp_path / "chats.jsonl"
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for row in range(40):
            turns = [("user", "why? " * int(rng.integers(1, 9))), ("assistant", "so. " * int(rng.integers(1, 20)))]
            messages = [{"role": role, "content": text} for role, text in turns]
            file.write(json.dumps({"messages": messages[: 1 if row in (13, 14, 35) else 2]}) + "\n")
    options = {"on_bad_row": on_bad_row}
    report, samples, num_rendered = checked(str(path), checkpoint, False, options)
    found = two_ranks.run(checked, str(path), checkpoint, True, options)
    assert [(report, samples)] * 2 == [(theirs, given) for theirs, given, _ in found]
    assert sum(number for _, _, number in found) == num_rendered
    assert all(number < 0.6 * num_rendered for _, _, number in found)
    if on_bad_row == "skip":
        assert (report.num_bad_rows, report.cut.num_samples > 3) == (3, True)
