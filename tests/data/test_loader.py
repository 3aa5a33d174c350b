"""The loader: every sample once an epoch, the same steps on any number of ranks, and an exact place."""

import itertools
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from made_samples import MadeSource, random_lengths

from torchtune.data.loader import DataLoader
from torchtune.data.plan import WindowSize
from torchtune.data.sample import Sample
from torchtune.data.sampler import RowSampler
from torchtune.errors import DataError

CASES = Path(__file__).parent.parent / "cases"
SMALL = WindowSize(num_rows=16, num_tokens=150, packs=1, first=4)
LENGTHS = random_lengths(90, longest=32)


def loader(source=None, *, shuffle=True, **changes):
    source = source or MadeSource(LENGTHS)
    shape = {"batch_size": 2, "gradient_accumulation_steps": 2, "max_seq_len": 32}
    options = {**shape, "packed": True, "seed": 5, "window": SMALL, **changes}
    return DataLoader(source, RowSampler(source.num_rows, seed=5, shuffle=shuffle), **options)


def contents(batch):
    """All that a batch holds, to compare."""
    return (batch.input_ids.tolist(), batch.labels.tolist(), batch.documents.lengths, batch.rows, batch.sources)


def epoch_of(data, epoch=0):
    """The steps of an epoch, each a list of what its micro-batches hold."""
    data.set_epoch(epoch)
    return [[contents(batch) for batch in step] for step in data]


def documents_in(step):
    """The documents of a step's micro-batches, without dummies, in no order: what the step trains on."""
    found = Counter()
    for input_ids, labels, lengths, rows, _ in step:
        if rows:
            ends = list(itertools.accumulate(lengths))
            for begin, end in zip([0, *ends], ends, strict=False):
                found[tuple(input_ids[begin:end]), tuple(labels[begin:end])] += 1
    return found


def documents_of(source):
    """The same for a whole source, by the definition of labels."""
    found = Counter()
    for sample in (sample for row in range(source.num_rows) for sample in source.samples_of(row)):
        ids, trained = sample.input_ids.tolist(), sample.trained.tolist()
        labels = [token if trains else -100 for token, trains in zip(ids[1:], trained[1:], strict=True)]
        found[tuple(ids), (*labels, -100)] += 1
    return found


def total(counters):
    return sum(counters, Counter())


# Which samples a step trains on


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("world_size", "accumulation", "batch_size"), [(1, 1, 1), (2, 1, 3), (3, 2, 1), (4, 3, 2)])
@pytest.mark.parametrize("num_rows", [1, 7, 90])
def test_every_sample_is_trained_once_an_epoch(num_rows, world_size, accumulation, batch_size, packed):
    """Over all ranks, whatever the tail; and each rank makes as many forwards as the others in each step."""
    source = MadeSource([[3], *LENGTHS][:num_rows])
    shape = {"world_size": world_size, "gradient_accumulation_steps": accumulation, "batch_size": batch_size}
    ranks = [epoch_of(loader(source, packed=packed, rank=rank, **shape)) for rank in range(world_size)]
    assert len({tuple(len(step) for step in steps) for steps in ranks}) == 1
    assert max(len(step) for step in ranks[0]) <= accumulation
    assert total(documents_in(step) for steps in ranks for step in steps) == documents_of(source)


@pytest.mark.parametrize("packed", [True, False])
def test_a_step_is_the_same_on_any_number_of_ranks(packed):
    """One rank accumulating four, two and two, four and one: the same documents in each step."""

    def steps(world_size, accumulation):
        shape = {"packed": packed, "world_size": world_size, "gradient_accumulation_steps": accumulation}
        ranks = [epoch_of(loader(rank=rank, **shape)) for rank in range(world_size)]
        return [total(documents_in(step) for step in of_ranks) for of_ranks in zip(*ranks, strict=True)]

    assert len(steps(1, 4)) > 3
    assert steps(1, 4) == steps(2, 2) == steps(4, 1)


def test_only_the_last_step_is_partial():
    steps = epoch_of(loader(packed=False))
    sizes = [sum(len(rows) for _, _, _, rows, _ in step) for step in steps]
    assert set(sizes[:-1]) == {4}
    assert 1 <= sizes[-1] <= 4
    assert sum(sizes) == sum(map(len, LENGTHS))


def test_packing_changes_no_trained_token():
    """C044: the multiset of tokens and labels is the same packed and unpacked."""
    packed, unpacked = (total(map(documents_in, epoch_of(loader(packed=packed)))) for packed in (True, False))
    assert packed == unpacked == documents_of(MadeSource(LENGTHS))


class WordSource:
    """The chats of a case, a token a word, with the assistant's words trained."""

    all_checked = True

    def __init__(self, name, num_rows=None):
        lines = (CASES / name).read_text(encoding="utf-8").splitlines()[:num_rows]
        self.chats = [json.loads(line)["messages"] for line in lines]
        self.words = sorted({word for chat in self.chats for turn in chat for word in turn["content"].split()})
        self.num_rows = len(self.chats)

    def samples_of(self, row_index):
        ids, trained = [], []
        for turn in self.chats[row_index]:
            for word in turn["content"].split():
                ids.append(self.words.index(word))
                trained.append(turn["role"] == "assistant")
        return [Sample(np.array(ids, np.int32), np.array(trained), f"case.jsonl:{row_index + 1}", row_index)]


def test_c044_the_assistants_words_alone_are_trained_packed_or_not():
    source = WordSource("C030.jsonl")
    trained = []
    for packed in (True, False):
        steps = list(loader(source, packed=packed))
        trained.append(Counter(label for step in steps for batch in step for label in batch.labels.tolist()))
        assert sum(batch.num_trained for step in steps for batch in step) == 5
    del trained[0][-100], trained[1][-100]
    assert trained[0] == trained[1]
    assert sorted(source.words[label] for label in trained[0].elements()) == ["Blue.", "It", "Yes.", "calm.", "is"]


def test_c053_fewer_packs_than_a_batch_are_one_step():
    source = WordSource("common_rows24.jsonl", num_rows=6)
    data = loader(source, max_seq_len=4096, batch_size=4, gradient_accumulation_steps=1)
    steps = epoch_of(data)
    assert len(steps) == data.num_steps_per_epoch(0) == 1
    assert total(map(documents_in, steps)) == documents_of(source)


@pytest.mark.parametrize("world_size", [2, 3])
def test_c053_ranks_without_rows_run_a_dummy(world_size):
    source = WordSource("common_rows24.jsonl", num_rows=1)
    ranks = [list(loader(source, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert [[len(step) for step in steps] for steps in ranks] == [[1]] * world_size
    assert [steps[0][0].num_tokens > 0 for steps in ranks] == [True] + [False] * (world_size - 1)


def test_c100_steps_are_optimizer_steps():
    """24 rows, 4 a micro-batch, 2 accumulated: 3 steps of 2 micro-batches, in another order each epoch."""
    data = loader(WordSource("common_rows24.jsonl"), packed=False, batch_size=4, max_seq_len=64)
    epochs = [epoch_of(data, epoch) for epoch in (0, 1)]
    assert [[len(step) for step in steps] for steps in epochs] == [[2, 2, 2], [2, 2, 2]]
    rows = [[row for step in steps for _, _, _, rows, _ in step for row in rows] for steps in epochs]
    assert sorted(rows[0]) == sorted(rows[1]) == list(range(24))
    assert rows[0] != rows[1]


# The order


@pytest.mark.parametrize("packed", [True, False])
def test_an_epoch_has_its_own_order_and_always_the_same(packed):
    data = loader(packed=packed)
    first, second = epoch_of(data, 0), epoch_of(data, 1)
    assert first != second
    assert epoch_of(data, 0) == first
    assert epoch_of(loader(packed=packed), 1) == second


def test_without_shuffle_samples_come_in_the_order_of_the_file():
    steps = epoch_of(loader(packed=False, shuffle=False, batch_size=1, gradient_accumulation_steps=1))
    rows = [row for step in steps for _, _, _, rows, _ in step for row in rows]
    assert rows == [row for row, lengths in enumerate(LENGTHS) for _ in lengths]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("epoch", [0, 1])
def test_the_number_of_steps_is_known_beforehand(epoch, packed):
    data = loader(packed=packed)
    assert data.num_steps_per_epoch(epoch) == len(epoch_of(data, epoch))


def test_the_number_of_steps_is_not_known_where_rows_are_not_read_yet():
    assert loader(MadeSource(LENGTHS, all_checked=False)).num_steps_per_epoch(0) is None


# The place


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("window", [SMALL, WindowSize()])
def test_going_on_from_any_place_gives_what_never_stopping_gives(packed, window):
    """Across windows and an epoch's end; the place travels through JSON, as in a checkpoint."""
    unbroken, places = [], []
    data = loader(packed=packed, window=window)
    for epoch in range(2):
        data.set_epoch(epoch)
        places.append((json.dumps(data.state_dict()), len(unbroken)))
        for step in data:
            unbroken.append([contents(batch) for batch in step])
            places.append((json.dumps(data.state_dict()), len(unbroken)))
        places.append((json.dumps(data.state_dict()), len(unbroken)))
    for place, num_steps in places:
        resumed = loader(packed=packed, window=window)
        resumed.load_state_dict(json.loads(place))
        assert resumed.state_dict() == json.loads(place)
        begin = resumed.sampler.epoch
        rest = [step for epoch in range(begin, 2) for step in epoch_of(resumed, epoch)]
        assert rest == unbroken[num_steps:]


def test_a_place_is_the_same_for_every_number_of_ranks():
    """Saved on two ranks, gone on with on four: no sample twice, none left out."""
    data = loader(world_size=2, gradient_accumulation_steps=2)
    done = [[contents(batch) for batch in step] for step in itertools.islice(data, 2)]
    state = data.state_dict()
    other = loader(world_size=2, gradient_accumulation_steps=2, rank=1)
    done += [[contents(batch) for batch in step] for step in itertools.islice(other, 2)]
    rest = []
    for rank in range(4):
        resumed = loader(world_size=4, gradient_accumulation_steps=1, rank=rank)
        resumed.load_state_dict(state)
        rest += epoch_of(resumed)
    assert total(map(documents_in, done + rest)) == documents_of(MadeSource(LENGTHS))


def test_what_is_read_ahead_does_not_count():
    """The place is behind the step that the loop holds, whatever the thread has read by then."""
    data = loader()
    steps = iter(data)
    next(steps)
    place = data.state_dict()
    time.sleep(0.2)
    assert data.state_dict() == place
    next(steps)
    assert data.state_dict() != place
    steps.close()


def test_resuming_reads_no_row_before_the_window():
    data = loader()
    steps = iter(data)
    while data.state_dict()["window"] < 40:
        next(steps)
    steps.close()
    source = MadeSource(LENGTHS, all_checked=False)
    resumed = loader(source)
    resumed.load_state_dict(data.state_dict())
    list(resumed)
    assert source.asked == resumed.sampler.order()[data.state_dict()["window"] :].tolist()


def test_a_place_behind_a_window_does_not_need_it():
    """Or a whole window would be tokenised to be skipped."""
    data = loader(batch_size=1, gradient_accumulation_steps=1)
    places = [data.state_dict() for _ in data]
    at_borders = [place for place in places if place["packs_consumed"] == 0]
    ends = [window.end for window in data._plan(0).windows(map(data.source.samples_of, data.sampler.order().tolist()))]
    assert [place["window"] for place in at_borders] == ends
    assert [place["rows_consumed"] for place in at_borders] == ends


def test_a_loop_without_a_loaded_place_begins_at_the_beginning():
    """A held-out set is gone through again and again, also when a loop over it was left early."""
    data = loader()
    every_step = [[contents(batch) for batch in step] for step in data]
    next(iter(data))
    assert [[contents(batch) for batch in step] for step in data] == every_step


def test_a_place_in_another_epoch_is_not_used():
    data = loader()
    list(itertools.islice(data, 3))
    resumed = loader()
    resumed.load_state_dict(data.state_dict())
    assert epoch_of(resumed, 1) == epoch_of(loader(), 1)
    assert epoch_of(resumed, 0) == epoch_of(loader(), 0)


def test_the_sampler_may_be_told_the_epoch():
    """As loops do that hold both; a place loaded for another epoch is then not used either."""
    data = loader()
    list(itertools.islice(data, 3))
    resumed = loader()
    resumed.load_state_dict(data.state_dict())
    resumed.sampler.set_epoch(1)
    assert [[contents(batch) for batch in step] for step in resumed] == epoch_of(loader(), 1)
    assert resumed.state_dict()["epoch"] == 1


@pytest.mark.parametrize("packed", [True, False])
def test_rows_consumed_grow_to_all_rows(packed):
    """The progress that schedules go by; rows that give no sample count too."""
    data = loader(MadeSource([*LENGTHS] + [[]] * 50), shuffle=False, packed=packed)
    seen = [data.rows_consumed for _ in data]
    assert seen == sorted(seen)
    assert seen[0] > 0
    assert data.rows_consumed == data.num_rows == len(LENGTHS) + 50


def test_changed_data_does_not_hide(caplog):
    """A place behind the window's last pack means that something changed; it is said, and the run goes on."""
    data = loader(window=WindowSize())
    data.load_state_dict({"epoch": 0, "window": 0, "packs_consumed": 10_000, "rows_consumed": 50})
    assert list(data) == []
    assert "10000" in caplog.text


# Rows that can't be trained on


@pytest.mark.parametrize("packed", [True, False])
def test_a_bad_row_is_raised_between_steps_before_it_is_trained(packed):
    """The steps before its window are given out, the place is behind them, and the mended file goes on there."""
    source = MadeSource(LENGTHS, all_checked=False)
    source.bad_row = int(loader().sampler.order()[60])
    data = loader(source, packed=packed)
    seen = []
    with pytest.raises(DataError) as caught:
        seen.extend([contents(batch) for batch in step] for step in data)
    assert caught.value.source == f"made.jsonl:{source.bad_row + 1}"
    good = epoch_of(loader(packed=packed))
    assert 0 < len(seen) < len(good)
    assert seen == good[: len(seen)]
    mended = loader(packed=packed)
    mended.load_state_dict(data.state_dict())
    assert epoch_of(mended) == good[len(seen) :]


# Ahead of the loop


def test_reading_goes_on_while_the_loop_trains():
    """C129: an epoch takes as long as the slower of reading and training, not as both."""
    source = MadeSource([[8]] * 200, all_checked=False, seconds_per_row=0.002)
    data = loader(source, max_seq_len=8, batch_size=5, window=WindowSize(num_rows=20, num_tokens=10**6, first=20))
    start = time.perf_counter()
    for _ in data:
        time.sleep(0.05)  # 20 steps, 1.0 s; the rows take 0.4 s, the first window of them 0.04 s
    assert time.perf_counter() - start < 1.2


def test_c129_a_row_is_read_once_an_epoch():
    source = MadeSource(LENGTHS, all_checked=False)
    list(loader(source))
    assert sorted(source.asked) == list(range(len(LENGTHS)))


def test_no_more_than_a_window_is_read_ahead():
    source = MadeSource([[8]] * 200, all_checked=False)
    steps = iter(loader(source, window=WindowSize(num_rows=20, num_tokens=10**6, first=20)))
    next(steps)
    time.sleep(0.2)
    assert len(source.asked) == 40  # the window that is trained on, and the next
    steps.close()
