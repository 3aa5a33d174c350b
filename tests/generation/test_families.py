"""Greedy answers of every family, in batches, against transformers' own, one at a time.

`python -m tests.generation.test_families 50` tries that many prompts of each.
"""

import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tests.models.oracle import random_model
from tests.models.support import config_of
from torchtune.checkpoint.load import load_model
from torchtune.generation.generate import generate
from torchtune.models.build import FILES
from torchtune.modules.decoding import ready_to_decode

NEW = 12


def check_family(model_type, folder, num_prompts):
    """Prompts of 1 to 20 tokens, five at a time; a model that says one thing alone would hide everything."""
    config = config_of(model_type)
    theirs = random_model(config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias"):
                parameter.sub_(1.0).mul_(0.3)  # around zero: large ones would say the same token always
    theirs.save_pretrained(folder)
    ours = load_model(folder, dtype=torch.float32)
    ready_to_decode(ours)
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(1, 21, (num_prompts,), generator=generator).tolist()
    prompts = [torch.randint(5, 97, (length,), generator=generator).tolist() for length in lengths]
    found = {a.prompt: a.ids for a in generate(ours, prompts, max_new_tokens=NEW, batch_size=5) if a.ended_by}
    for place, ids in enumerate(prompts):
        expected = theirs.generate(
            torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert found[place] == expected[0, len(ids) :].tolist(), (model_type, place)
    assert len({token for ids in found.values() for token in ids}) > 3


@pytest.mark.parametrize("model_type", sorted(FILES))
def test_answers_are_those_of_transformers(tmp_path, model_type):
    check_family(model_type, tmp_path, 6)


if __name__ == "__main__":
    for name in sorted(FILES):
        with tempfile.TemporaryDirectory() as work:
            check_family(name, Path(work), int(sys.argv[1]))
            print(name, "as transformers", flush=True)
