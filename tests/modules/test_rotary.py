"""Rotary embeddings from a config's options; each kind against transformers is in tests/models/test_llama.py."""

import pytest
import torch

from torchtune.errors import CheckpointError, UnsupportedError
from torchtune.modules.rotary import build_rotary

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}
LONGROPE |= {"short_factor": [1.0, 2.0, 3.0, 4.0], "long_factor": [2.0, 3.0, 4.0, 5.0]}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}


def angles(rope, length=40):
    rotary = build_rotary(rope, head_dim=8, max_position_embeddings=32)
    return rotary.angles(torch.arange(length), torch.float64, lengths=[length])


@pytest.mark.parametrize("rope", [LLAMA3, YARN, LONGROPE])
def test_the_original_context_is_the_models_where_it_is_not_said(rope):
    """As transformers reads such a config."""
    expected = angles({**rope, "original_max_position_embeddings": 32})
    found = angles(rope)
    assert torch.equal(found.cos, expected.cos)
    assert torch.equal(found.sin, expected.sin)


@pytest.mark.parametrize(
    ("rope", "key"),
    [
        ({"rope_type": "linear", "rope_theta": 1e4}, "factor"),
        ({name: value for name, value in LLAMA3.items() if name != "low_freq_factor"}, "low_freq_factor"),
        ({name: value for name, value in LONGROPE.items() if name != "long_factor"}, "long_factor"),
    ],
)
def test_a_missing_option_is_named(rope, key):
    """The type and the key, before any weight is read."""
    with pytest.raises(CheckpointError, match=f"of type '{rope['rope_type']}' needs '{key}'"):
        angles(rope)


def test_an_unknown_type_is_named():
    """With the nearest that there is."""
    with pytest.raises(UnsupportedError, match="'yarm' is not supported.*'yarn'"):
        angles(YARN | {"rope_type": "yarm"})


def test_half_of_each_head_may_be_turned():
    """Dims beyond the turned share pass through; those within keep their length, pair by pair."""
    x = torch.randn(5, 2, 8, dtype=torch.float64)
    rotary = build_rotary(
        {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, head_dim=8, max_position_embeddings=32, interleaved=True
    )
    turned = rotary.angles(torch.arange(5), torch.float64, lengths=[5]).turn(x)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert torch.equal(turned[0], x[0])
    before, after = (torch.view_as_complex(t[..., :4].unflatten(-1, (2, 2)).contiguous()) for t in (x, turned))
    expected = torch.polar(torch.ones(5, 2), torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.01])).to(before.dtype)
    torch.testing.assert_close(after, before * expected[:, None], rtol=0, atol=1e-6)
