"""What the head costs a trained token, from a checkpoint's sizes."""

import pytest

from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_config
from torchtune.checkpoint.open import open_checkpoint
from torchtune.recipes.choices import head_cost


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_over_the_layers(tmp_path, tied):
    """However many matrices of the vocabulary there are, a token meets one at the end."""
    config = tiny_config(tie_word_embeddings=tied)
    checkpoint = open_checkpoint(save_tiny_checkpoint(tmp_path / "model", config))
    head = checkpoint.config["vocab_size"] * checkpoint.config["hidden_size"]
    layers = checkpoint.num_parameters - head * (1 if tied else 2)
    assert head_cost(checkpoint) == pytest.approx(head / layers)
