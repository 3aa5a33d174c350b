"""The plan: windows that cover the rows, packs that cover the samples, and a fair deal of them."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from made_samples import MadeSource, made_sample, random_lengths

from torchtune.data.plan import Pack, Plan, WindowSize, deal
from torchtune.errors import DataError

SMALL = WindowSize(num_rows=16, num_tokens=150, packs=1, first=4)


def plan(**changes):
    options = {"seed": 1, "epoch": 0, "max_seq_len": 32, "packed": True, "shuffle": True, "size": SMALL}
    return Plan(**{**options, **changes})


def rows_of(lengths):
    source = MadeSource(lengths)
    return [source.samples_of(row) for row in range(source.num_rows)]


def ids(samples):
    return sorted(int(sample.input_ids[0]) for sample in samples)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 100])
def test_windows_hold_every_row_once_and_packs_every_sample_once(num_rows, packed):
    rows = rows_of(random_lengths(num_rows, longest=32))
    windows = list(plan(packed=packed).windows(rows))
    borders = [window.start for window in windows] + [windows[-1].end]
    assert borders == sorted(set(borders))
    assert (borders[0], borders[-1]) == (0, num_rows)
    for window in windows:
        packed_samples = [sample for pack in window.packs for sample in pack.samples]
        assert ids(packed_samples) == ids(itertools.chain(*rows[window.start : window.end]))


def test_packs_hold_at_most_max_seq_len():
    rows = rows_of(random_lengths(200, longest=32))
    packs = [pack for window in plan().windows(rows) for pack in window.packs]
    assert max(pack.num_tokens for pack in packs) <= 32
    assert all(pack.num_tokens == sum(len(sample.input_ids) for sample in pack.samples) for pack in packs)


def test_unpacked_rows_are_one_sample_each():
    rows = rows_of(random_lengths(50, longest=32))
    packs = [pack for window in plan(packed=False).windows(rows) for pack in window.packs]
    assert {len(pack.samples) for pack in packs} == {1}


@pytest.mark.parametrize("packed", [True, False])
def test_a_window_is_the_same_without_those_before_it(packed):
    """What resuming rests on: only the window of the place has to be read again."""
    rows = rows_of(random_lengths(120, longest=32))
    windows = list(plan(packed=packed).windows(rows))
    assert len(windows) > 4
    for number, window in enumerate(windows):
        again = list(plan(packed=packed).windows(rows[window.start :], window.start))
        assert [w.start for w in again] == [w.start for w in windows[number:]]
        assert [[ids(p.samples) for p in w.packs] for w in again] == [
            [ids(p.samples) for p in w.packs] for w in windows[number:]
        ]


def test_a_window_is_full_by_rows_or_by_tokens():
    size = WindowSize(num_rows=8, num_tokens=100, packs=1, first=8)
    few_tokens = plan(size=size).windows(rows_of([[1]] * 20))
    assert [(w.start, w.end) for w in few_tokens] == [(0, 8), (8, 16), (16, 20)]
    many_tokens = plan(size=size).windows(rows_of([[32]] * 9))
    assert [(w.start, w.end) for w in many_tokens] == [(0, 4), (4, 8), (8, 9)]


def test_the_first_windows_are_short_and_grow():
    """Step 1 waits for one window: where rows are tokenised as they come it should not wait long."""
    size = WindowSize(num_rows=16, num_tokens=10**6, packs=1, first=2)
    windows = plan(size=size).windows(rows_of([[1]] * 64))
    assert [w.end - w.start for w in windows] == [2, 2, 4, 8, 16, 16, 16]


def test_rows_without_a_sample_make_no_empty_window():
    """However many there are: a window goes on until it has something to train on."""
    windows = list(plan().windows(rows_of([[]] * 50 + [[5]] * 10 + [[]] * 50)))
    assert [bool(window.packs) for window in windows[:-1]] == [True] * (len(windows) - 1)
    assert len(windows) >= 2


def test_training_goes_not_by_length():
    """Best-fit packing makes the packs of long samples first; training in that order would drift."""
    packs = next(plan(size=WindowSize()).windows(rows_of(random_lengths(400, longest=32)))).packs
    longest = [max(len(sample.input_ids) for sample in pack.samples) for pack in packs]
    firsts = [pack.samples[0].row for pack in packs]
    place = np.arange(len(packs))
    assert abs(np.corrcoef(place, longest)[0, 1]) < 0.25
    assert abs(np.corrcoef(place, firsts)[0, 1]) < 0.25


def test_the_order_of_packs_depends_on_seed_epoch_and_window():
    rows = rows_of([[20]] * 12)
    size = WindowSize(num_rows=6, first=6)

    def orders(**changes):
        windows = plan(size=size, **changes).windows(rows)
        return [tuple(pack.samples[0].row - w.start for pack in w.packs) for w in windows]

    seen = orders() + orders(seed=2) + orders(epoch=1)
    assert len(set(seen)) == 6
    assert orders() == orders()


@pytest.mark.parametrize("packed", [True, False])
def test_without_shuffle_packs_go_by_their_first_sample(packed):
    packs = next(plan(shuffle=False, packed=packed, size=WindowSize()).windows(rows_of([[20], [9], [16], [12], [2]])))
    firsts = [pack.samples[0].row for pack in packs.packs]
    assert firsts == sorted(firsts)
    assert firsts == ([0, 1] if packed else [0, 1, 2, 3, 4])


@pytest.mark.parametrize("packed", [True, False])
def test_the_count_of_packs_is_that_of_the_plan(packed):
    lengths = random_lengths(150, longest=32)
    packs = [pack for window in plan(packed=packed).windows(rows_of(lengths)) for pack in window.packs]
    assert plan(packed=packed).num_packs(lengths) == len(packs)


@pytest.mark.parametrize("packed", [True, False])
def test_every_row_with_a_sample_begins_in_one_pack(packed):
    lengths = random_lengths(150, longest=32)
    packs = [pack for window in plan(packed=packed).windows(rows_of(lengths)) for pack in window.packs]
    assert sum(pack.num_rows for pack in packs) == sum(1 for row in lengths if row)


@pytest.mark.parametrize("packed", [True, False])
def test_c052_a_sample_over_max_seq_len_names_its_line(packed):
    with pytest.raises(DataError) as caught:
        list(plan(packed=packed).windows(rows_of([[32], [33]])))
    assert caught.value.source == "made.jsonl:2"
    assert "33" in caught.value.problem
    assert "max_seq_len=32" in caught.value.problem


def made_packs(lengths):
    return [Pack((made_sample(length, row),), num_rows=1) for row, length in enumerate(lengths)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("num_packs", range(1, 25, 4))
def test_dealing_gives_every_pack_once_and_every_rank_as_many_micro_batches(world_size, batch_size, num_packs):
    packs = made_packs(np.random.default_rng(num_packs).integers(1, 40, num_packs).tolist())
    dealt = deal(packs, world_size=world_size, batch_size=batch_size)
    micro_batches = [micro for micros in dealt for micro in micros]
    assert sorted(pack.samples[0].row for micro in micro_batches for pack in micro) == list(range(num_packs))
    assert {len(micros) for micros in dealt} == {-(-num_packs // (world_size * batch_size))}
    assert max(len(micro) for micro in micro_batches) <= batch_size
    assert len(dealt) == world_size


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("head_cost", [0.0, 2.0])
def test_dealing_balances_what_ranks_have_to_do(batch_size, head_cost):
    """Ranks wait for each other, and the fullest micro-batch sets the memory: none should be much fuller."""
    rng = np.random.default_rng(0)
    lengths, num_ranks = rng.integers(1, 1000, 32 * batch_size), 4
    packs = [SimpleNamespace(num_tokens=int(n), num_trained=int(n * rng.random())) for n in lengths]
    dealt = deal(packs, world_size=num_ranks, batch_size=batch_size, head_cost=head_cost)
    costs = np.array(
        [[sum(p.num_tokens + head_cost * p.num_trained for p in micro) for micro in micros] for micros in dealt]
    )
    assert costs.shape == (num_ranks, 8)
    of_ranks, side_by_side = costs.sum(axis=1), costs.max(axis=0)
    assert of_ranks.max() < 1.05 * of_ranks.mean()
    # What ranks that wait for each other in every micro-batch take, against no waiting at all.
    assert side_by_side.sum() < 1.1 * of_ranks.mean()
    if batch_size > 1:
        assert costs.max() < 1.05 * costs.mean()


def test_what_is_left_at_the_end_is_spread_over_the_ranks():
    """Three packs, two ranks, room for four each: not three on one rank."""
    dealt = deal(made_packs([10, 11, 12]), world_size=2, batch_size=4)
    assert sorted([len(micro) for micro in micros] for micros in dealt) == [[1], [2]]
