"""What all tests share: two threads at most, so that their numbers and times do not depend on the machine."""

import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="module")
def one_thread():
    """Torch with one thread: for products this small a second one only waits, on a busy machine for long."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
