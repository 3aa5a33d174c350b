"""Finding a family: known, unknown, and added from outside the package."""

import pytest
import torch
from transformers import Qwen3Config

from tests.models.oracle import HEADS, SIZES, save_random
from torchtune.checkpoint import load_model
from torchtune.errors import CheckpointError, UnsupportedError
from torchtune.models import build, qwen3
from torchtune.models.build import build_model, families, find_family, register_family


def test_an_unknown_architecture_is_named_with_the_nearest():
    """The name as the config has it, and what is near it."""
    with pytest.raises(UnsupportedError, match="'qwen3_next' is not supported; the nearest that are: .*qwen3"):
        build_model({"model_type": "qwen3_next"})
    with pytest.raises(UnsupportedError, match=r"'t5' is not supported\. `tune ls --models` lists all"):
        build_model({"model_type": "t5"})
    with pytest.raises(CheckpointError, match="no 'model_type'"):
        build_model({})
    with pytest.raises(UnsupportedError, match="LlamaForSequenceClassification is no causal language model"):
        build_model({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]})


def test_a_missing_key_is_named():
    """What the family can't do without."""
    with pytest.raises(CheckpointError, match="config.json has no 'hidden_size'"):
        build_model({"model_type": "llama", "num_hidden_layers": 1, "vocab_size": 5})


def test_a_family_from_outside_is_built_loaded_and_listed(tmp_path, monkeypatch):
    """`register_family` makes a model_type known to everything that builds."""
    monkeypatch.setattr(build, "_registered", {})
    theirs = save_random(tmp_path, Qwen3Config(**SIZES, **HEADS, head_dim=8))
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"model_type": "qwen3"', '"model_type": "mine"'))
    with pytest.raises(UnsupportedError, match="'mine'"):
        load_model(tmp_path)
    register_family("mine", qwen3.build, covers="my own")
    ids = torch.randint(0, 97, (1, 12))
    torch.testing.assert_close(load_model(tmp_path)(ids), theirs(ids).logits, rtol=0, atol=1e-4)
    assert find_family("mine").covers == "my own"
    assert "mine" in {family.model_type for family in families()}


def test_every_family_says_what_it_covers():
    """The list that `tune ls --models` prints has a word for each."""
    assert all(family.covers for family in families())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": None}, "vocab_size: None is no size"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers: '3' is no size"),
        ({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok: 3 of 2"),
    ],
)
def test_a_size_that_is_none_is_named(changes, said):
    """The key and what it holds, not an error from deep within."""
    config = {"model_type": "llama", **SIZES, **HEADS, **changes}
    with pytest.raises(CheckpointError, match=said):
        build_model(config)


def test_rows_with_positions_are_documents_of_their_own():
    """A row whose positions go on where the row before it ended does not see that row; labels must fit."""
    model = build_model({"model_type": "llama", **SIZES, **HEADS})
    ids = torch.randint(0, 97, (2, 9))
    positions = torch.stack([torch.arange(9), torch.arange(9, 18)])
    together = model(ids, positions=positions)
    for row in range(2):
        torch.testing.assert_close(together[row], model(ids[row], positions=positions[row]))
    with pytest.raises(ValueError, match=r"labels \(2, 5\) must have the shape of input_ids \(2, 9\)"):
        model(ids, labels=ids[:, :5])


def test_load_model_takes_a_type_by_any_of_its_names(tmp_path):
    """torch's object, torch's name and the short name; without one, the checkpoint's."""
    save_random(tmp_path, Qwen3Config(**SIZES, **HEADS, head_dim=8))
    for dtype in (torch.bfloat16, "bfloat16", "torch.bfloat16", "bf16"):
        assert {p.dtype for p in load_model(tmp_path, dtype=dtype).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_model(tmp_path).parameters()} == {torch.float32}
    with pytest.raises(ValueError, match="'bf61' is no dtype; fp32, bf16"):
        load_model(tmp_path, dtype="bf61")
