"""Quantisation-aware training: it computes what the quantised model computes, and its gradient goes straight through."""

import copy

import pytest
import torch
from transformers import MixtralConfig

from tests.tiny_checkpoint import tiny_config
from torchtune.adapters.adapter import adapter_of
from torchtune.adapters.config import LoRAConfig
from torchtune.adapters.lora import LoRALinear, apply_lora
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


def adapted_model():
    """The small Llama with an update on every linear layer, B not zero."""
    model = tiny_model()
    apply_lora(model, LoRAConfig(rank=3, alpha=6.0))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(("kind", "group_size"), SCHEMES)
def test_an_adapted_model_computes_with_its_merged_weights_quantised(kind, group_size):
    """Bit for bit, the layers of one input and the gated product too."""
    scheme = scheme_of(kind, group_size=group_size)
    model, merged = adapted_model(), tiny_model()
    with torch.no_grad():
        for name, update in adapter_of(model, LoRAConfig(rank=3, alpha=6.0)).updates.items():
            weight = merged.get_parameter(f"{name}.weight")
            weight.copy_(scheme.decode(scheme.encode(update.merge_into(weight)), torch.float32))
        apply_qat(model, scheme)
        assert torch.equal(loss_of(model), loss_of(merged))


@pytest.mark.parametrize(("kind", "group_size"), SCHEMES)
@pytest.mark.parametrize("bias", [False, True])
def test_the_gradient_of_an_update_goes_straight_through(kind, group_size, bias):
    """y = x r(W + s B A)': autograd in float64 of the sum, with what rounding changes as a constant added to it."""
    scheme = scheme_of(kind, group_size=group_size)
    torch.manual_seed(1)
    layer = LoRALinear(Linear(64, 24, bias=bias), rank=3, scale=0.7)
    for factor in (layer.lora_A, layer.lora_B):
        torch.nn.init.normal_(factor.weight)
    layer.weight.requires_grad_(False)
    layer.rounding = scheme.rounded
    x, to = torch.randn(7, 64, requires_grad=True), torch.randn(7, 24)
    out = layer(x)
    out.backward(to)
    weight, a, b, wide_x = (
        value.detach().double().requires_grad_()
        for value in (layer.weight, layer.lora_A.weight, layer.lora_B.weight, x)
    )
    merged = layer.weight + (layer.lora_B.weight @ layer.lora_A.weight).detach() * 0.7
    total = weight + 0.7 * b @ a
    rounded = total + (scheme.decode(scheme.encode(merged), torch.float64) - total).detach()
    expected = torch.nn.functional.linear(wide_x, rounded, layer.bias.detach().double() if bias else None)
    expected.backward(to.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for found, wanted in ((layer.lora_A.weight, a), (layer.lora_B.weight, b), (x, wide_x)):
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-5, atol=1e-4)
    assert layer.weight.grad is None


def test_updates_of_an_adapted_model_get_the_gradients_of_its_weights():
    """Of a model whose weights are the rounded sums: dL/dA = s B' dL/dW and dL/dB = s dL/dW A'."""
    scheme = scheme_of("int4", group_size=32)
    model, merged = adapted_model(), tiny_model()
    updates = adapter_of(model, LoRAConfig(rank=3, alpha=6.0)).updates
    with torch.no_grad():
        for name, update in updates.items():
            weight = merged.get_parameter(f"{name}.weight")
            weight.copy_(scheme.rounded(update.merge_into(weight)))
    loss_of(merged).backward()
    apply_qat(model, scheme)
    loss_of(model).backward()
    for name, update in updates.items():
        of_weight = merged.get_parameter(f"{name}.weight").grad
        close = {"rtol": 1e-4, "atol": 1e-5 * of_weight.abs().max().item()}
        torch.testing.assert_close(update.a.grad, update.scale * update.b.T @ of_weight, **close)
        torch.testing.assert_close(update.b.grad, update.scale * of_weight @ update.a.T, **close)


def test_what_is_no_plain_update_is_refused():
    """DoRA's lengths and dropout: by the layer's name."""
    for config in (LoRAConfig(rank=3, use_dora=True), LoRAConfig(rank=3, dropout=0.1)):
        model = tiny_model()
        apply_lora(model, config)
        with pytest.raises(UnsupportedError, match="q_proj has DoRA or dropout"):
            apply_qat(model, scheme_of("int8"))


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
