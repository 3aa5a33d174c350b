"""The tests of this folder run on one thread."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread):
    return one_thread
