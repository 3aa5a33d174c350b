"""Packing: every document once, no row too full, and hardly a row more than needed."""

import time

import numpy as np
import pytest

from torchtune.data.packing import pack
from torchtune.errors import DataError


def brute_force_num_rows(lengths, capacity):
    """Best-fit decreasing as its definition reads: look through all rows for the fullest that fits."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return len(rooms)


def some_lengths(seed, capacity):
    rng = np.random.default_rng(seed)
    longest = [capacity, capacity // 3, 5][seed % 3]
    return rng.integers(1, longest + 1, size=int(rng.integers(1, 300))).tolist()


@pytest.mark.parametrize("seed", range(12))
def test_every_document_is_in_one_row_and_no_row_is_too_full(seed):
    lengths = some_lengths(seed, 64)
    rows = pack(lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert max(sum(lengths[index] for index in row) for row in rows) <= 64


@pytest.mark.parametrize("seed", range(12))
def test_as_few_rows_as_best_fit_decreasing_by_its_definition(seed):
    lengths = some_lengths(seed, 64)
    assert len(pack(lengths, 64)) == brute_force_num_rows(lengths, 64)


@pytest.mark.parametrize("longest", [2048, 700, 100])
def test_rows_are_nearly_full(longest):
    """At most 1.05 times the rows that all tokens need without a gap, for data as it is usually spread."""
    lengths = np.random.default_rng(1).integers(1, longest + 1, 2000)
    assert len(pack(lengths.tolist(), 2048)) <= 1.05 * -(-lengths.sum() // 2048)


def test_rows_and_their_documents_stand_in_the_order_of_the_data():
    rows = pack([10, 30, 20, 50, 40, 5], 60)
    assert all(row == sorted(row) for row in rows)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)


def test_the_same_lengths_give_the_same_rows():
    lengths = some_lengths(0, 64)
    assert pack(lengths, 64) == pack(np.array(lengths), 64)


def test_c052_a_document_as_long_as_the_row_fills_it():
    """Lengths at the border: 60 fits whole and alone, ten times 30 share five rows."""
    assert pack([60] + [30] * 10, 60) == [[0]] + [[i, i + 1] for i in range(1, 11, 2)]


@pytest.mark.parametrize("length", [61, 121])
def test_c052_a_document_longer_than_the_row_is_refused(length):
    with pytest.raises(DataError, match=rf"document 1 .*{length} .*60"):
        pack([60, length, 30], 60)


def test_no_documents_need_no_rows():
    assert pack([], 8) == []


def test_a_hundred_thousand_documents_take_a_moment():
    """Looking through all rows for each document would take minutes."""
    lengths = np.random.default_rng(0).integers(1, 131_073, 100_000)
    start = time.perf_counter()
    pack(lengths.tolist(), 131_072)
    assert time.perf_counter() - start < 5
