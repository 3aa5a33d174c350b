"""What is computed otherwise for few tokens, while no gradient is asked for, against the same in float64."""

import pytest
import torch
import torch.nn.functional as F

from torchtune.modules import linear
from torchtune.modules.norms import RMSNorm


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_rows", [1, 2, 16, 17])
@pytest.mark.parametrize("has_tiles", [True, False])
def test_products_of_few_rows(monkeypatch, has_tiles, num_rows, has_bias):
    """Whichever factor comes first, on any CPU."""
    monkeypatch.setattr(linear, "has_matrix_tiles", lambda: has_tiles)
    torch.manual_seed(0)
    layer = linear.Linear(24, 40, bias=has_bias).bfloat16()
    x = torch.randn(num_rows, 24).bfloat16()
    with torch.no_grad():
        found = layer(x)
        weight, bias = layer.weight.double(), layer.bias.double() if has_bias else None
        torch.testing.assert_close(found.double(), F.linear(x.double(), weight, bias), rtol=2**-7, atol=2**-7)
    assert found.shape == (num_rows, 40)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("from_one", [True, False])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-3, 0.0), (30.0, 200.0)])
def test_rms_norm_of_few_tokens(dtype, from_one, scale, offset):
    """Small values, where eps counts, and values with a mean far from zero among them."""
    torch.manual_seed(0)
    norm = RMSNorm(48, 1e-5, from_one=from_one).to(dtype)
    with torch.no_grad():
        norm.weight.normal_(1.0, 0.2)
        x = (torch.randn(2, 3, 48) * scale + offset).to(dtype)
        wide = x.double()
        weight = norm.weight.double() + from_one
        expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        tolerance = {torch.bfloat16: 2**-7, torch.float32: 3e-6, torch.float64: 1e-12}[dtype]
        torch.testing.assert_close(norm(x).double(), expected, rtol=tolerance, atol=tolerance)
        assert norm(x).is_contiguous()
