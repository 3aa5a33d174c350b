"""The experts' linear layer against a loop in float64."""

import pytest
import torch

from torchtune.modules.grouped import grouped_linear

COUNTS = [3, 0, 5, 1, 0]


def loop(x, weight, transposed):
    """Each group of rows by its own matrix, as autograd sees it."""
    parts = x.split(COUNTS)
    matrices = weight if transposed else weight.mT
    return torch.cat([part @ matrix for part, matrix in zip(parts, matrices, strict=True)])


def inputs(transposed, dtype, weight_dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(COUNTS), 6, generator=generator).to(dtype).requires_grad_()
    shape = (len(COUNTS), 6, 4) if transposed else (len(COUNTS), 4, 6)
    weight = torch.randn(shape, generator=generator).to(weight_dtype).requires_grad_()
    return x, weight, torch.randn(sum(COUNTS), 4, generator=generator).to(dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 0.03),
        (torch.float16, torch.float32, 0.004),
        (torch.bfloat16, torch.bfloat16, 0.03),
    ],
)
def test_equals_a_loop_in_float64(transposed, dtype, weight_dtype, tolerance):
    """Values and gradients, with empty groups, and weights of another type than the rows."""
    x, weight, grad = inputs(transposed, dtype, weight_dtype)
    out = grouped_linear(x, weight, torch.tensor(COUNTS), transposed=transposed)
    out.backward(grad)
    wide_x, wide_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = loop(wide_x, wide_weight, transposed)
    expected.backward(grad.double())
    assert (out.dtype, x.grad.dtype, weight.grad.dtype) == (dtype, dtype, weight_dtype)
    for found, wanted in ((out, expected), (x.grad, wide_x.grad), (weight.grad, wide_weight.grad)):
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


def test_frozen_weights_still_lead_back_to_the_rows():
    """What is frozen gets no gradient, what isn't gets all of it, and rows that nothing asks about none."""
    x, weight, grad = inputs(False, torch.float64, torch.float64)
    both = torch.autograd.grad(grouped_linear(x, weight, torch.tensor(COUNTS)), (x, weight), grad)
    frozen = weight.detach()
    (alone,) = torch.autograd.grad(grouped_linear(x, frozen, torch.tensor(COUNTS)), x, grad)
    torch.testing.assert_close(alone, both[0])
    (weights,) = torch.autograd.grad(grouped_linear(x.detach(), weight, torch.tensor(COUNTS)), weight, grad)
    torch.testing.assert_close(weights, both[1])


def test_no_rows_at_all():
    """A rank without tokens gets no rows, and zeros for gradients."""
    weight = torch.ones(2, 3, 4, requires_grad=True)
    out = grouped_linear(torch.ones(0, 4), weight, torch.tensor([0, 0]))
    out.sum().backward()
    assert out.shape == (0, 3)
    assert not weight.grad.any()
