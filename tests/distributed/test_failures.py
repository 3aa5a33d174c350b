"""Which rank tells of a failure, where the store of the ranks is gone with its host."""

import pytest
import torch.distributed as dist

from torchtune.distributed import failures


class Gone:
    """A store whose host has ended."""

    def add(self, key, amount):
        raise dist.DistNetworkError("closed")


class Counting:
    """A store that is there."""

    def __init__(self, count):
        self.count = count

    def add(self, key, amount):
        self.count += amount
        return self.count


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(failures, "SECONDS_FOR_THE_FIRST", 0.0)
    monkeypatch.setattr(failures, "_is_first", False)


@pytest.mark.parametrize(("of_this_machine", "tells"), [("4", False), ("2", True)])
def test_a_rank_that_only_follows_is_silent_where_the_agent_sees_all(monkeypatch, of_this_machine, tells):
    """On one machine the first has told or was killed, which its agent tells; of another one nothing is known."""
    monkeypatch.setattr(failures, "_store", Gone())
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", of_this_machine)
    assert failures.is_to_tell(2) == tells


@pytest.mark.parametrize(("num_failed", "tells"), [(0, True), (1, False)])
def test_one_tells_where_none_has(monkeypatch, num_failed, tells):
    monkeypatch.setattr(failures, "_store", Counting(num_failed))
    assert failures.is_to_tell(2) == tells
