"""Activations by their formulas, alone and within feed-forward blocks, gradients too."""

import math

import pytest
import torch

from torchtune.modules.activations import ACTIVATIONS
from torchtune.modules.feed_forward import FeedForward, PlainFeedForward


def tanh_gelu(x):
    """Hendrycks & Gimpel, 2016 (arXiv:1606.08415), section 2."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu(x):
    """x times the normal distribution's share below it."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def silu(x):
    """x sigmoid(x)."""
    return x / (1 + torch.exp(-x))


FORMULAS = {
    "silu": silu,
    "swish": silu,
    "gelu": gelu,
    "gelu_python": gelu,
    "gelu_new": tanh_gelu,
    "gelu_pytorch_tanh": tanh_gelu,
    "gelu_fast": tanh_gelu,
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "relu": lambda x: x * (x > 0),
    "relu2": lambda x: x**2 * (x > 0),
}


def test_every_activation_has_its_formula_here():
    """A new one is tested or this fails."""
    assert ACTIVATIONS.keys() == FORMULAS.keys()


@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["plain", "gated", "fused"])
def test_feed_forward_in_float64(kind, activation, bias):
    """Values and all gradients of down(act(up)), and of down(act(gate) * up), from one matrix or two."""
    torch.manual_seed(0)
    if kind == "plain":
        block = PlainFeedForward(6, 10, activation=activation, bias=bias).double()
    else:
        block = FeedForward(6, 10, activation=activation, bias=bias, fused=kind == "fused").double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    named = {name: value.detach().clone().requires_grad_() for name, value in block.named_parameters()}
    x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    other = x.detach().clone().requires_grad_()

    def linear(name, value):
        made = value @ named[f"{name}.weight"].T
        return made + named[f"{name}.bias"] if bias else made

    formula = FORMULAS[activation]
    if kind == "plain":
        product = formula(linear("up_proj", other))
    elif kind == "fused":
        both = linear("gate_up_proj", other)
        product = formula(both[:, :10]) * both[:, 10:]
    else:
        product = formula(linear("gate_proj", other)) * linear("up_proj", other)
    expected = linear("down_proj", product)
    out = block(x)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(x.grad, other.grad)
    for name, value in block.named_parameters():
        torch.testing.assert_close(value.grad, named[name].grad)
