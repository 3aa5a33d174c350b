"""Norms in float64 against their formulas, gradients included; in half precision against float64."""

import pytest
import torch
from torch.nn import functional as F

from torchtune.modules.norms import LayerNorm, RMSNorm


def check_in_float64(norm, plain, *shape):
    """Values, and gradients of the input and of each parameter, are those of plain autograd."""
    torch.manual_seed(0)
    norm = norm.double()
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, 0.5, 0.3)
    named = {name: value.detach().clone().requires_grad_() for name, value in norm.named_parameters()}
    # Far from zero in the mean, or centring would hardly show.
    x = (torch.randn(shape, dtype=torch.float64) + 2).requires_grad_()
    other = x.detach().clone().requires_grad_()
    out, expected = norm(x), plain(other, **named)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(x.grad, other.grad)
    for name, value in norm.named_parameters():
        torch.testing.assert_close(value.grad, named[name].grad)


@pytest.mark.parametrize("from_one", [False, True])
def test_rms_norm(from_one):
    """x / rms(x), times the weight or the weight and one."""

    def plain(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt() * (weight + 1 if from_one else weight)

    check_in_float64(RMSNorm(6, 1e-2, from_one=from_one), plain, 4, 3, 6)


@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm(bias):
    """What torch's own layer norm gives."""

    def plain(x, weight, bias=None):
        return F.layer_norm(x, (6,), weight, bias, 1e-2)

    check_in_float64(LayerNorm(6, 1e-2, bias=bias), plain, 4, 3, 6)


@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm_of_each_head(bias):
    """Each head is normed on its own, with a weight of its own."""

    def plain(x, weight, bias=None):
        heads = [
            F.layer_norm(x[:, head], (6,), weight[head], None if bias is None else bias[head], 1e-2)
            for head in range(3)
        ]
        return torch.stack(heads, dim=1)

    check_in_float64(LayerNorm((3, 6), 1e-2, bias=bias), plain, 4, 3, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "norm", [RMSNorm(64, 1e-6), RMSNorm(64, 1e-6, from_one=True), LayerNorm(64, 1e-5), LayerNorm((2, 64), 1e-5)]
)
def test_half_precision_is_rounded_once(norm, dtype):
    """Everything within is float32, whatever goes in and out: half a step from float64's result."""
    torch.manual_seed(0)
    x = (30 * torch.randn(5, 2, 64) + 100).to(dtype)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, 0.01, 0.02)
    out = norm(x)
    expected = norm.double()(x.double())
    norm.float()
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-4)


def test_a_fresh_norm_changes_only_the_scale():
    """Weights begin at one, or at no distance from it."""
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = F.rms_norm(x, (8,), eps=1e-6)
    torch.testing.assert_close(RMSNorm(8, 1e-6)(x), expected)
    torch.testing.assert_close(RMSNorm(8, 1e-6, from_one=True)(x), expected)
    torch.testing.assert_close(LayerNorm(8, 1e-5)(x), F.layer_norm(x, (8,)))
