"""Choosing tokens, against transformers' warpers and the distribution itself."""

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from torchtune.generation.sampling import Sampling, candidates, choose, generator_of, penalised

OPTIONS = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 2.0, "min_p": 0.2},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
]


def logits(rows=4, size=50, scale=3.0):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(0)) * scale


@pytest.mark.parametrize("options", OPTIONS)
def test_the_distribution_is_that_of_transformers(options):
    given = logits()
    warpers = LogitsProcessorList([TemperatureLogitsWarper(options["temperature"])])
    if "top_k" in options:
        warpers.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        warpers.append(TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        warpers.append(MinPLogitsWarper(options["min_p"]))
    expected = warpers(None, given.clone()).softmax(-1)
    probabilities, tokens = candidates(given, Sampling(**options))
    found = torch.zeros_like(given).scatter(-1, tokens, probabilities)
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), expected)


def test_the_penalty_is_that_of_transformers():
    given, ids = logits(), torch.tensor([[1, 2, 3, 3], [4, 4, 4, 4], [0, 9, 8, 7], [49, 1, 5, 6]])
    seen = torch.zeros_like(given, dtype=torch.bool).scatter(-1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, given.clone())
    torch.testing.assert_close(penalised(given, seen, 1.7), expected)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    """A hundred thousand draws of one distribution; within five standard deviations."""
    sampling, draws = Sampling(temperature=1.0, top_k=6), 100_000
    row = logits(1)
    generator = generator_of(0, 0)
    drawn = choose(row.expand(draws, -1), sampling, [generator] * draws)
    probabilities, tokens = candidates(row, sampling)
    expected = (probabilities / probabilities.sum())[0]
    for token, probability in zip(tokens[0].tolist(), expected.tolist(), strict=True):
        deviation = (probability * (1 - probability) / draws) ** 0.5
        assert abs((drawn == token).double().mean() - probability) <= 5 * deviation


def test_a_text_draws_its_own_numbers_in_any_batch():
    sampling, given = Sampling(temperature=1.0), logits()
    together = choose(given, sampling, [generator_of(3, text) for text in range(4)])
    alone = [choose(given[text : text + 1], sampling, [generator_of(3, text)]) for text in range(4)]
    assert together.tolist() == torch.cat(alone).tolist()
    others = {tuple(choose(given, sampling, [generator_of(seed, t) for t in range(4)]).tolist()) for seed in range(5)}
    assert len(others) > 1


@pytest.mark.parametrize(
    ("options", "greedy"),
    [
        ({"temperature": 0.0}, True),
        ({"temperature": 1e-8}, True),
        ({"temperature": 1e-30}, True),
        ({"temperature": 1.0, "top_k": 10**6}, False),
        ({"temperature": 1.0, "top_k": 1}, True),
        ({"temperature": 1.0, "top_p": 0.0}, True),
        ({"temperature": 1.0, "top_p": 1.0}, False),
        ({"temperature": 1.0, "min_p": 1.0}, True),
    ],
)
def test_case_c120_extremes_draw_a_token_all_the_same(options, greedy):
    """Also from logits as large as half precision has them."""
    for given in (logits(), torch.where(logits() > 0, 65504.0, -65504.0) + torch.arange(50.0), logits().half()):
        generators = [np.random.default_rng(text) for text in range(len(given))]
        tokens = choose(given, Sampling(**options), generators)
        assert tokens.shape == (4,)
        assert ((tokens >= 0) & (tokens < 50)).all()
        if greedy and given.dtype == torch.float32:
            assert tokens.tolist() == given.argmax(-1).tolist()


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 1.5}, {"min_p": -0.1}, {"repetition_penalty": 0.0}],
)
def test_case_c120_what_has_no_meaning_is_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value} is out of its bounds"):
        Sampling(**options)
