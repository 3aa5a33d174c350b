"""Many prompts at once: each answer is the one that its prompt has alone, and transformers' own."""

import pytest
import torch
from transformers.models.auto import AutoConfig

from tests.models.families import FAMILIES
from tests.models.oracle import save_random
from torchtune.checkpoint.load import load_model
from torchtune.generation import beginnings
from torchtune.generation.beginnings import Remembered, beginning_of
from torchtune.generation.generate import generate
from torchtune.modules.decoding import ready_to_decode

LENGTHS = (3, 1, 17, 9, 2, 30, 5, 8, 1, 12, 4, 21)
NEW = 14


def prompts(vocab_size=97):
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(5, vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]


def answers(model, *args, **options):
    """By prompt; each is looked at when it has ended."""
    ended = [answer for answer in generate(model, *args, **options) if answer.ended_by]
    assert len(ended) == len({answer.prompt for answer in ended})
    return sorted(ended, key=lambda answer: answer.prompt)


def config_of(values):
    values = dict(values)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def greedy(model, ids, new, *, grows):
    """transformers' answer; where frequencies change with the length its cache keeps old ones, so without it."""
    if not grows:
        found = model.generate(
            torch.tensor([ids]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return found[0, len(ids) :].tolist()
    text = list(ids)
    for _ in range(new):
        text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(ids) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_any_size_gives_what_transformers_gives_alone(tmp_path, family):
    """Windows, caps, sinks, chunks, latent heads, experts; prompts of 1 to 30 tokens, places that are used again."""
    config = config_of(FAMILIES[family])
    theirs = save_random(tmp_path, config)
    model = load_model(tmp_path, dtype=torch.float32)
    ready_to_decode(model)
    given = prompts()
    alone = answers(model, given, max_new_tokens=NEW, batch_size=1)
    for batch_size in (3, 8):
        together = answers(model, given, max_new_tokens=NEW, batch_size=batch_size)
        assert [answer.ids for answer in together] == [answer.ids for answer in alone]
    for ids, answer in zip(given, alone, strict=True):
        new = min(NEW, (model.model.max_positions or 10**6) - len(ids))
        assert answer.ended_by == ("length" if new == NEW else "context")
        assert answer.ids == greedy(theirs, ids, new, grows="rope_parameters" in FAMILIES[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_remembered_is_not_read_again_and_changes_nothing(tmp_path, family):
    """Prompts that begin with the last one and its answer, with a part of it, with nothing of it, and the same again."""
    save_random(tmp_path, config_of(FAMILIES[family]))
    model = load_model(tmp_path, dtype=torch.float32)
    first, more = prompts()[5][:10], prompts()[9]
    begun = first + answers(model, [first], max_new_tokens=6)[0].ids
    grows = not model.model.turns_alike(1, 10_000)
    remembered, num_read = Remembered(), 0

    def count(_, args):
        nonlocal num_read
        num_read += args[0].numel()

    for prompt, known in ((first, 0), (begun + more, 15), (begun[:9] + more[:3], 9), (more, 0), (more, len(more) - 1)):
        expected = answers(model, [prompt], max_new_tokens=6)[0].ids
        num_read = 0
        with model.register_forward_pre_hook(count):
            found = answers(model, [prompt], max_new_tokens=6, batch_size=1, remembered=remembered)[0].ids
        assert found == expected
        if not grows:
            assert num_read == len(prompt) - known + 5


@pytest.mark.parametrize("family", FAMILIES)
def test_what_all_prompts_begin_with_is_read_once(tmp_path, family, monkeypatch):
    """One of them ends where the others part, another is there twice; slots are used again."""
    monkeypatch.setattr(beginnings, "MIN_SHARED", 8)
    save_random(tmp_path, config_of(FAMILIES[family]))
    model = load_model(tmp_path, dtype=torch.float32)
    alike = prompts()[5][:13]
    given = [alike + more[:9] for more in prompts()[:7]]
    given += [given[3], alike]
    num_read = 0

    def count(_, args):
        nonlocal num_read
        num_read += args[0].numel()

    alone = [answers(model, [ids], max_new_tokens=5)[0].ids for ids in given]
    for batch_size in (1, 4):
        num_read = 0
        with model.model.register_forward_pre_hook(count):
            together = answers(model, given, max_new_tokens=5, batch_size=batch_size)
        assert [answer.ids for answer in together] == alone
        if model.model.turns_alike(1, 10_000):
            own = sum(len(ids) - 13 for ids in given[:-1]) + 1  # the last token of each is read for what follows
            assert num_read == 13 + own + 4 * len(given)


def test_a_beginning_is_shared_where_it_is_much_of_each_prompt():
    """Of one prompt there is nothing to share, nor of many that part early."""
    alike = list(range(40))
    assert beginning_of([[*alike, 1], [*alike, 2, 3], alike]) == alike
    assert beginning_of([alike]) == ()
    assert beginning_of([]) == ()
    assert beginning_of([[*alike[:31], 7], alike]) == ()
    assert beginning_of([alike, alike * 5]) == ()
    assert beginning_of([alike, []]) == ()
    assert beginning_of([alike, alike, [*alike[:35], 7]]) == alike[:35]
