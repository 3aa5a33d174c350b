"""The order of rows: each once, another in each epoch, the same whenever it is asked for."""

import numpy as np
import pytest

from torchtune.data.sampler import RowSampler


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_rows", [0, 1, 100])
def test_every_row_comes_once(num_rows, shuffle):
    order = RowSampler(num_rows, seed=3, shuffle=shuffle).order()
    assert sorted(order.tolist()) == list(range(num_rows))


def test_without_shuffle_the_order_is_the_files():
    sampler = RowSampler(10, seed=3, shuffle=False)
    sampler.set_epoch(4)
    assert sampler.order().tolist() == list(range(10))


def test_each_epoch_and_each_seed_has_its_own_order():
    orders = [RowSampler(100, seed).order(epoch).tolist() for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 6


def test_an_order_depends_on_nothing_that_was_asked_before():
    used = RowSampler(100, seed=7)
    for epoch in (0, 3, 1):
        used.set_epoch(epoch)
        used.order()
    used.set_epoch(2)
    np.random.seed(0)
    fresh = RowSampler(100, seed=7)
    fresh.set_epoch(2)
    assert used.order().tolist() == fresh.order().tolist() == fresh.order(2).tolist()
