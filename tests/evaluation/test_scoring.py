"""Log-likelihoods of continuations against a forward of each text alone."""

import pytest
import torch

from tests.models.families import FAMILIES
from torchtune.evaluation.prefix_tree import MIN_SHARED, prefix_tree
from torchtune.evaluation.scoring import score
from torchtune.models.build import build_model


def random_model(config):
    torch.manual_seed(0)
    model = build_model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.3)
    return model.double()


def pairs(longest=40):
    """Contexts that begin alike, of one token, that are another's beginning; continuations of one token and of many."""
    generator = torch.Generator().manual_seed(1)

    def draw(length):
        return torch.randint(0, 97, (length,), generator=generator).tolist()

    shots, other = draw(12), draw(MIN_SHARED - 1)
    contexts = [shots + draw(5), shots + draw(3), shots, other + draw(2), other + draw(4), draw(1), draw(longest - 8)]
    found = []
    for context in contexts:
        found += [(context, draw(length)) for length in (1, 1, 4, 7)]
    found.append((contexts[0], found[2][1][:2]))
    return [*found[::3], *found[1::3], *found[2::3], found[0]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_tokens", [30, 4096])
def test_scores_are_those_of_each_text_alone(family, batch_tokens):
    """Windows, chunks, caps, sinks, frequencies of a document's length; in one batch and in many."""
    model = random_model(FAMILIES[family])
    given = pairs()
    found = dict(score(model, given, batch_tokens=batch_tokens))
    assert sorted(found) == list(range(len(given)))
    for place, (context, continuation) in enumerate(given):
        with torch.no_grad():
            logits = model(torch.tensor([[*context, *continuation][:-1]]))[0, len(context) - 1 :]
        logprobs = logits.log_softmax(-1)[range(len(continuation)), continuation]
        assert found[place].logprob == pytest.approx(logprobs.sum().item(), abs=1e-4)
        assert found[place].is_greedy == (logits.argmax(-1).tolist() == continuation)


def test_a_likely_continuation_is_greedy():
    model = random_model(FAMILIES["llama"])
    context = [5, 6, 7]
    with torch.no_grad():
        first = int(model(torch.tensor([context]))[0, -1].argmax())
        second = int(model(torch.tensor([[*context, first]]))[0, -1].argmax())
    found = dict(score(model, [(context, [first, second]), (context, [first, (second + 1) % 97])]))
    assert [found[0].is_greedy, found[1].is_greedy] == [True, False]


def test_what_is_common_is_fed_once():
    shots = list(range(20))
    texts = [[*shots, 30], [*shots, 30, 31], [*shots, 40], list(range(50, 53))]
    tree = prefix_tree(texts)
    assert tree.input_ids.tolist() == [*shots, 30, 31, 40, 50, 51, 52]
    assert tree.documents.lengths == (21, 1, 1, 3)
    assert tree.documents.positions.tolist() == [*range(21), 21, 20, 0, 1, 2]
    for text, places in zip(texts, tree.places, strict=True):
        assert tree.input_ids[places].tolist() == text
