"""Quantisation-aware training: it computes what the quantised model computes, and its gradient goes straight through."""

import copy

import pytest
import torch
from transformers import MixtralConfig

from tests.tiny_checkpoint import tiny_config
from torchtune.errors import ConfigError, UnsupportedError
from torchtune.models.build import build_model
from torchtune.modules.documents import Documents
from torchtune.modules.linear import Linear
from torchtune.quantization.encoding import encoding_of
from torchtune.quantization.qat import RoundedLinear, apply_qat
from torchtune.quantization.schemes import scheme_of

pytestmark = pytest.mark.usefixtures("one_thread")
SCHEMES = [("int4", None), ("int4", 32), ("int8", None), ("int8", 16)]
IDS = torch.arange(5, 45)


def tiny_model(**changes):
    """A random Llama of width 64 in float32."""
    torch.manual_seed(0)
    values = {"num_hidden_layers": 2, "intermediate_size": 128} | changes
    model = build_model(tiny_config(**values).to_dict())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.05)
    return model


def loss_of(model):
    """Something with a gradient for all weights."""
    return model(IDS, Documents.from_lengths([len(IDS)])).float().logsumexp(-1).square().mean()


@pytest.mark.parametrize(("kind", "group_size"), SCHEMES)
def test_the_forward_is_that_of_the_quantised_weights(kind, group_size):
    """Bit for bit: of what `encode` writes and `decode` reads, in a plain linear layer."""
    scheme = scheme_of(kind, group_size=group_size)
    model = tiny_model()
    quantised = copy.deepcopy(model)
    with torch.no_grad():
        for name in encoding_of(model, scheme).names:
            weight = quantised.get_parameter(name)
            weight.copy_(scheme.decode(scheme.encode(weight), torch.float32))
    expected = loss_of(quantised)
    assert not torch.equal(expected, loss_of(model))
    apply_qat(model, scheme)
    assert torch.equal(loss_of(model), expected)


@pytest.mark.parametrize(("kind", "group_size"), SCHEMES)
def test_the_gradient_goes_straight_through(kind, group_size):
    """To the weight goes that of the rounded weight: y = x r(W)' has dL/dW = (dL/dy)' x, in float64 by hand."""
    scheme = scheme_of(kind, group_size=group_size)
    torch.manual_seed(1)
    layer = Linear(64, 24)
    layer.__class__, layer.scheme = RoundedLinear, scheme
    x = torch.randn(7, 64, requires_grad=True)
    to = torch.randn(7, 24)
    layer(x).backward(to)
    rounded = scheme.decode(scheme.encode(layer.weight.detach()), torch.float64)
    torch.testing.assert_close(layer.weight.grad.double(), to.double().T @ x.detach().double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad.double(), to.double().sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), to.double() @ rounded, rtol=1e-5, atol=1e-5)


def test_rounding_is_to_the_nearest_multiple_of_the_scale():
    """By float64 arithmetic on each group: within half a step, but for the largest of a group of sixteen codes."""
    weight = torch.randn(6, 128)
    for kind, codes in (("int4", (-8, 7)), ("int8", (-127, 127))):
        scheme = scheme_of(kind, group_size=32)
        scale = scheme.encode(weight)["weight_scale"].double().repeat_interleave(32, dim=1)
        steps = (weight.double() / scale).round().clamp(*codes)
        assert torch.equal(scheme.rounded(weight).double(), (steps * scale).float().double())


def test_parameters_stay_what_they_are():
    """Names, values and what is not quantised."""
    model = tiny_model(tie_word_embeddings=False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    layers = apply_qat(model, scheme_of("int4", group_size=32))
    assert len(layers) == 14
    assert type(model.lm_head) is not RoundedLinear
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_groups_that_do_not_divide_are_named():
    """Layers, their rows, and a size that fits, on the meta device."""
    with torch.device("meta"):
        model = build_model(tiny_config(hidden_size=96, intermediate_size=160).to_dict())
    with pytest.raises(ConfigError) as caught:
        apply_qat(model, scheme_of("int4", group_size=64))
    text = str(caught.value)
    assert "model.layers.0.self_attn.q_proj has rows of 96, which groups of 64 don't divide" in text
    assert "group_size=32 divides all" in text
    assert not any(isinstance(module, RoundedLinear) for module in model.modules())


def test_experts_are_refused_with_the_reason():
    config = MixtralConfig(
        vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_local_experts=2
    )
    with torch.device("meta"):
        model = build_model(config.to_dict())
    with pytest.raises(UnsupportedError, match="it has experts"):
        apply_qat(model, scheme_of("int8"))
