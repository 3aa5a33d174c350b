"""What all tests share: two threads at most, so that their numbers and times do not depend on the machine."""

import os

import pytest
import torch

from tests.ranks import RankPool

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="module")
def one_thread():
    """Torch with one thread: for products this small a second one only waits, on a busy machine for long."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def kept_environment():
    """The environment is afterwards what it was: a launcher writes to it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def two_ranks():
    """Two gloo ranks: `two_ranks.run(function, *args)`."""
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four_ranks():
    """Four gloo ranks: `four_ranks.run(function, *args)`."""
    pool = RankPool(4)
    yield pool
    pool.close()
