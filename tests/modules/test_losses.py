"""The fused cross-entropy of capped logits against plain autograd."""

import pytest
import torch
from torch.nn import functional as F

from torchtune.modules.losses import LinearCrossEntropy


def inputs(num_rows, dtype=torch.float64, spread=3.0):
    """hidden [N, 6], weight [11, 6] with logits well beyond a cap of two, targets [N]."""
    torch.manual_seed(0)
    hidden = spread * torch.randn(num_rows, 6, dtype=torch.float64)
    weight = torch.randn(11, 6, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), torch.randint(0, 11, (num_rows,))


def plain(hidden, weight, targets, softcap):
    """The definition, all logits at once."""
    logits = softcap * torch.tanh(hidden @ weight.T / softcap)
    return F.cross_entropy(logits, targets, reduction="sum")


@pytest.mark.parametrize("softcap", [0.5, 2.0, 30.0])
@pytest.mark.parametrize("num_rows", [1, 5, 7, 30])
def test_softcap_in_float64(num_rows, softcap):
    """The sum and both gradients, in chunks of seven rows, for caps that bind and one that hardly does."""
    hidden, weight, targets = inputs(num_rows)
    other_hidden, other_weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    loss = LinearCrossEntropy(chunk_size=7)(hidden, weight, targets, softcap=softcap)
    expected = plain(other_hidden, other_weight, targets, softcap)
    torch.testing.assert_close(loss, expected)
    (loss / 3).backward()
    (expected / 3).backward()
    torch.testing.assert_close(hidden.grad, other_hidden.grad)
    torch.testing.assert_close(weight.grad, other_weight.grad)


def test_softcap_in_bfloat16():
    """Capped in float32: within the rounding of the products, which are bfloat16."""
    hidden, weight, targets = inputs(30, torch.bfloat16)
    others = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    loss = LinearCrossEntropy(chunk_size=7)(hidden, weight, targets, softcap=2.0)
    expected = plain(*others, targets, 2.0)
    assert loss.dtype == torch.float32
    steps = 4 * torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(loss.double(), expected, rtol=steps, atol=0)
    loss.backward()
    expected.backward()
    for one, other in zip((hidden, weight), others, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=0, atol=steps * other.grad.abs().max().item())


def test_no_rows_leave_a_zero_with_gradients():
    """A rank without a trained token still reaches the parameters."""
    hidden, weight, targets = inputs(0)
    loss = LinearCrossEntropy()(hidden, weight, targets, softcap=2.0)
    loss.backward()
    assert loss == 0
    assert hidden.grad.shape == (0, 6)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("num_rows", [0, 5, 30])
def test_bias_in_float64(num_rows, softcap):
    """A bias on the logits: the sum and all three gradients, before a cap where there is one."""
    hidden, weight, targets = inputs(num_rows)
    bias = torch.randn(11, dtype=torch.float64).requires_grad_()
    loss = LinearCrossEntropy(chunk_size=7)(hidden, weight, targets, bias=bias, softcap=softcap)
    given = torch.autograd.grad(loss / 3, (hidden, weight, bias), allow_unused=True, materialize_grads=True)
    logits = hidden @ weight.T + bias
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(capped, targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    for one, other in zip(given, torch.autograd.grad(expected / 3, (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(one, other)


def test_the_bias_alone_is_trained():
    """Where the projection is frozen, its bias still has a gradient, in its own type."""
    hidden, weight, targets = inputs(30, torch.bfloat16)
    bias = torch.zeros(11).requires_grad_()
    LinearCrossEntropy(chunk_size=7)(hidden.detach(), weight.detach(), targets, bias=bias).backward()
    expected = (hidden @ weight.T).float().softmax(-1).sum(0) - torch.bincount(targets, minlength=11)
    torch.testing.assert_close(bias.grad, expected, rtol=1e-2, atol=1e-2)


def test_the_gradient_of_a_narrow_weight_is_rounded_once():
    """What FSDP gathers is in bf16; its gradient is a sum over chunks, which must not be rounded chunk by chunk."""
    torch.manual_seed(0)
    hidden = torch.randn(512, 16).bfloat16()
    weight, targets = torch.randn(32, 16).bfloat16().requires_grad_(), torch.randint(32, (512,))
    LinearCrossEntropy(chunk_size=4)(hidden, weight, targets).backward()
    exact = weight.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(hidden.double() @ exact.T, targets, reduction="sum").backward()
    error = (weight.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 0.004  # one rounding of bf16, and those of the logits' gradient; chunk by chunk it is 0.01
