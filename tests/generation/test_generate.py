"""Greedy generation against transformers (C119, C121)."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.models.auto import AutoModelForCausalLM

from tests.models.oracle import save_random
from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_config
from torchtune.checkpoint.load import load_model
from torchtune.checkpoint.open import open_checkpoint
from torchtune.generation.generate import generate, generate_one
from torchtune.models.build import build_model
from torchtune.models.config import context_length

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [3.0, 4.0, 5.0, 6.0],
}
LENGTHS = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
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
    found = list(generate_one(model, ids, max_new_tokens=20))
    expected = theirs.generate(
        torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=4
    )
    assert found == expected[0, len(ids) :].tolist()
    for index, token in enumerate(found):
        assert model(torch.tensor([ids + found[:index]]))[0, -1].argmax() == token


def test_case_c119_the_context_ends_an_answer_and_a_prompt_that_fills_it_is_refused(models):
    """With prompt and limit."""
    (*_, answer) = generate(models[0], [[5] * 100], max_new_tokens=29)
    assert (len(answer.ids), answer.ended_by) == (28, "context")
    with pytest.raises(ValueError, match=r"prompt 1 has 128 tokens, and the model 128 positions"):
        list(generate(models[0], [[5], [5] * 128], max_new_tokens=1))


def test_case_c121_stops_at_every_id_of_the_generation_config(models):
    """The first of them that is most likely ends the answer and is not part of it."""
    model, _, checkpoint = models
    assert checkpoint.stop_ids == [1, 3]
    ids = checkpoint.tokenizer().encode("hello").ids
    free = list(generate_one(model, ids, max_new_tokens=8))
    stop = free[3]
    assert list(generate_one(model, ids, max_new_tokens=8, stop_ids={stop})) == free[: free.index(stop)]


@pytest.mark.parametrize(
    "config",
    [
        Phi3Config(
            **LENGTHS | HEADS, rope_parameters=LONGROPE, max_position_embeddings=64, original_max_position_embeddings=16
        ),
        LlamaConfig(
            **LENGTHS | HEADS,
            rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
            max_position_embeddings=16,
        ),
    ],
    ids=["longrope", "dynamic"],
)
def test_text_that_outgrows_its_frequencies(tmp_path, config):
    """From 12 tokens over the 16 of the original context to 32, each as transformers' forward of the whole makes it."""
    theirs = save_random(tmp_path, config)
    model = load_model(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, 97, (12,), generator=torch.Generator().manual_seed(3)).tolist()
    found = list(generate_one(model, ids, max_new_tokens=20))
    assert len(set(found)) > 4, "a text of one token would hide everything"
    assert context_length(config.to_dict()) == model.model.max_positions == 64
    for index, token in enumerate(found):
        assert theirs(torch.tensor([ids + found[:index]])).logits[0, -1].argmax() == token
    cache = model.empty_cache()
    model(torch.tensor(ids + found[:4]), cache=cache)
    with pytest.raises(ValueError, match="the 16 tokens in the cache were turned by other frequencies"):
        model(torch.tensor(found[4:5]), cache=cache)
