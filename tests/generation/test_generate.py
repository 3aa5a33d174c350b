"""Greedy generation against transformers (C119, C121)."""

import json
from pathlib import Path

import pytest
import torch
from transformers.models.auto import AutoModelForCausalLM

from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_config
from torchtune.checkpoint.open import open_checkpoint
from torchtune.generation.generate import generate
from torchtune.models.build import build_model

PROMPTS = Path(__file__).parent.parent / "cases" / "common_prompts.jsonl"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Ours and transformers' from one checkpoint of 128 positions that stops at ids 1 and 3."""
    folder = save_tiny_checkpoint(
        tmp_path_factory.mktemp("generate") / "tiny", tiny_config(max_position_embeddings=128)
    )
    generation = {"eos_token_id": [1, 3], "bos_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    checkpoint = open_checkpoint(str(folder))
    with torch.device("meta"):
        model = build_model(checkpoint.config)
    checkpoint.load_into(model)
    return model, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), checkpoint


@pytest.mark.parametrize("line", range(3))
def test_case_c119_cached_tokens_equal_transformers_and_the_uncached_argmax(models, line):
    """Twenty tokens, with a cache, as transformers makes them, and as the whole forward makes each."""
    model, theirs, checkpoint = models
    prompt = json.loads(PROMPTS.read_text().splitlines()[line])["prompt"]
    ids = checkpoint.tokenizer().encode(prompt).ids
    found = list(generate(model, ids, max_new_tokens=20))
    expected = theirs.generate(
        torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=4
    )
    assert found == expected[0, len(ids) :].tolist()
    for index, token in enumerate(found):
        assert model(torch.tensor([ids + found[:index]]))[0, -1].argmax() == token


def test_case_c119_positions_beyond_the_model_are_refused(models):
    """With prompt, new tokens and limit."""
    with pytest.raises(ValueError, match=r"100 prompt tokens and 29 new ones .* 128"):
        next(generate(models[0], [5] * 100, max_new_tokens=29))


def test_case_c121_stops_at_every_id_of_the_generation_config(models):
    """The first of them that is most likely ends the answer and is not part of it."""
    model, _, checkpoint = models
    assert checkpoint.stop_ids == [1, 3]
    ids = checkpoint.tokenizer().encode("hello").ids
    free = list(generate(model, ids, max_new_tokens=8))
    stop = free[3]
    assert list(generate(model, ids, max_new_tokens=8, stop_ids={stop})) == free[: free.index(stop)]
