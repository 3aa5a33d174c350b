"""The learning-rate formula against torch's own schedulers and hand-made values."""

import math

import pytest

from torchtune.training.lr_schedulers import lr_factor


def rates(name, total, warmup, floor=0.0):
    return [
        lr_factor(
            step, step / total, name=name, num_warmup_steps=warmup, warmup_progress=warmup / total, min_lr_ratio=floor
        )
        for step in range(1, total + 1)
    ]


def test_case_c098_four_steps_with_two_of_warmup():
    """No update is wasted at rate 0, the peak is reached at the end of the warm-up, the floor at the last step."""
    assert rates("cosine", 4, 2, floor=0.1) == pytest.approx([0.5, 1.0, 0.55, 0.1])


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_rates_are_positive_and_peak_at_one(name, warmup):
    """Over any shape, no rate is above the peak, none is zero with a floor, and the warm-up is linear."""
    values = rates(name, 20, warmup, floor=0.05)
    assert all(0 < value <= 1 for value in values)
    assert values[:warmup] == pytest.approx([(k + 1) / warmup for k in range(warmup)])
    assert values[-1] == pytest.approx(1.0 if name == "constant" else 0.05)


def test_cosine_is_half_a_period():
    """Between warm-up and end the cosine follows its formula."""
    values = rates("cosine", 10, 0)
    assert values == pytest.approx([(1 + math.cos(math.pi * k / 10)) / 2 for k in range(1, 11)])


def test_warmup_as_long_as_the_run():
    """A run that ends within its warm-up never divides by zero."""
    assert rates("cosine", 3, 3) == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert lr_factor(4, 1.0, num_warmup_steps=3, warmup_progress=1.0, min_lr_ratio=0.2) == pytest.approx(0.2)
