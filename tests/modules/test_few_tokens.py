"""What is computed otherwise for few tokens, while no gradient is asked for, against the same in float64."""

import platform

import pytest
import torch
import torch.nn.functional as F

from tests.tiny_checkpoint import tiny_config
from torchtune.models.build import build_model
from torchtune.modules import products
from torchtune.modules.decoding import ready_to_decode
from torchtune.modules.linear import Linear
from torchtune.modules.norms import RMSNorm
from torchtune.modules.products import LaidOut


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_rows", [1, 2, 16, 17])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-7), (torch.float32, 1e-5)])
def test_products_with_a_copy_of_the_weight(num_rows, has_bias, dtype, tolerance):
    """As without; and of the weight as it is, when it was changed after the copy was made."""
    torch.manual_seed(0)
    layer = Linear(24, 40, bias=has_bias).to(dtype)
    x = torch.randn(num_rows, 24).to(dtype)

    def check():
        weight, bias = layer.weight.double(), layer.bias.double() if has_bias else None
        found = layer(x)
        assert found.shape == (num_rows, 40)
        torch.testing.assert_close(found.double(), F.linear(x.double(), weight, bias), rtol=tolerance, atol=tolerance)

    with torch.no_grad():
        layer.laid_out = LaidOut.of(layer.weight)
        assert layer.laid_out is None or layer.laid_out.serves(x, layer.weight) == (num_rows <= 16)
        check()
        layer.weight.mul_(2)
        check()
        layer.laid_out = LaidOut.of(layer.weight)
        layer.weight = torch.nn.Parameter(torch.randn(40, 24).to(dtype))
        check()


@pytest.mark.parametrize("has_bias", [True, False])
def test_large_products(has_bias, monkeypatch):
    """By either library, and with gradients; a strided input too."""
    torch.manual_seed(0)
    layer = Linear(256, 512, bias=has_bias)
    x = torch.randn(300, 512)[:, ::2]
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double() if has_bias else None)
    for is_amd in (True, False):
        monkeypatch.setattr(products, "_is_amd", lambda is_amd=is_amd: is_amd)
        with torch.no_grad():
            torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
        assert layer(x).requires_grad


def test_a_copy_is_made_of_plain_matrices_alone():
    """And only where the CPU multiplies them."""
    assert LaidOut.of(torch.randn(8, 8).double()) is None
    assert LaidOut.of(torch.empty(8, 8, device="meta", dtype=torch.bfloat16)) is None
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    assert (LaidOut.of(torch.randn(8, 8)) is not None) == (is_x86 and torch.backends.mkldnn.is_available())
    copy = LaidOut.of(torch.randn(8, 8).bfloat16())
    assert (copy is not None) == torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.bfloat16, 0.05, 0.02), (torch.float32, 1e-4, 1e-5)])
def test_a_model_with_copies_has_the_same_logits(dtype, rtol, atol):
    """Of few tokens and of many, before and after its weights are changed."""
    torch.manual_seed(0)
    config = tiny_config(num_hidden_layers=2).to_dict()
    model = build_model(config).to(dtype)
    ids = torch.randint(0, config["vocab_size"], (20,))
    with torch.no_grad():
        for _ in range(2):
            expected = [model(ids[:5]), model(ids)]
            ready_to_decode(model)
            for found, other in zip([model(ids[:5]), model(ids)], expected, strict=True):
                torch.testing.assert_close(found, other, rtol=rtol, atol=atol)
            before = expected[0]
            for parameter in model.parameters():
                parameter.mul_(1.5)
            assert not torch.allclose(model(ids[:5]), before, atol=0.05)


def test_weights_made_in_inference_mode_are_taken_as_they_are():
    """Nobody counts their changes, so that no copy can be told to be one of what they are now."""
    config = tiny_config(num_hidden_layers=1).to_dict()
    with torch.inference_mode():
        model = build_model(config)
        cache, ids = model.empty_cache(1), torch.tensor([[3, 5, 7]])
        expected = model(ids)
        ready_to_decode(model)
        torch.testing.assert_close(model(ids, cache=cache), expected)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        torch.testing.assert_close(model(ids), model(ids, cache=model.empty_cache(1)))
        assert model.head_laid_out is None
        assert model.model.steps == [None]


KINDS = {
    "plain": {},
    "grouped": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "gelu": {"hidden_act": "gelu"},
    "wide heads": {"head_dim": 32},
}


@pytest.fixture(params=KINDS)
def stepped(request):
    """A model that has been made ready, its cache after a prompt, and three tokens."""
    if LaidOut.of(torch.zeros(1, 1)) is None:
        pytest.skip("this machine's products have no copies of weights")
    torch.manual_seed(0)
    config = tiny_config(num_hidden_layers=2, **KINDS[request.param]).to_dict()
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        ready_to_decode(model)
        cache = model.empty_cache(3)
        ids = torch.randint(0, config["vocab_size"], (3, 6))
        model(ids, cache=cache)
        yield model, cache, torch.randint(0, config["vocab_size"], (3, 1))


def logits_of(model, cache, ids, *, by_steps):
    """Of the tokens behind what is cached, which stays as it is."""
    steps, model.model.steps = model.model.steps, model.model.steps if by_steps else ()
    before = cache.lengths
    found = model(ids, cache=cache)
    cache.forget(before)
    model.model.steps = steps
    return found


def test_layers_taken_apart_compute_what_they_are(stepped):
    """One token of each text, and two."""
    model, cache, ids = stepped
    assert all(step is not None and step.is_same() for step in model.model.steps)
    for each in (ids, torch.cat((ids, ids), dim=1)):
        expected = logits_of(model, cache, each, by_steps=False)
        torch.testing.assert_close(logits_of(model, cache, each, by_steps=True), expected, rtol=1e-5, atol=1e-5)


def more_biases(attention):
    attention.q_proj.bias = torch.nn.Parameter(torch.randn(attention.q_proj.out_features))
    attention.k_proj.bias = attention.v_proj.bias = None


class Doubled(Linear):
    def forward(self, x):
        return 2 * F.linear(x, self.weight, self.bias)


def other_layer_in_a_group(attention):
    attention.k_proj.__class__ = Doubled


@pytest.mark.parametrize("alter", [more_biases, other_layer_in_a_group])
def test_a_layer_that_cannot_be_joined_is_not_taken_apart(stepped, alter):
    """Though it was before it was altered and made ready again."""
    model, cache, ids = stepped
    alter(model.model.layers[1].self_attn)
    ready_to_decode(model)
    assert [step is not None for step in model.model.steps] == [True, False]
    found = logits_of(model, cache, ids, by_steps=True)
    torch.testing.assert_close(found, logits_of(model, cache, ids, by_steps=False), rtol=1e-5, atol=1e-5)


def listen(attention):
    attention.o_proj.register_forward_hook(lambda *_: torch.zeros(3, attention.o_proj.out_features))


def replace(attention):
    attention.v_proj = Linear(attention.v_proj.in_features, attention.v_proj.out_features)


def patch(attention):
    attention.forward = lambda x, *_: x


def change(attention):
    attention.k_proj.weight.mul_(3)


def exchange(attention):
    attention.q_proj.weight = torch.nn.Parameter(torch.randn_like(attention.q_proj.weight))


def move(attention):
    attention.o_proj.weight.data = torch.randn_like(attention.o_proj.weight)


def other_kind(attention):
    attention.o_proj.__class__ = Doubled


@pytest.mark.parametrize("alter", [listen, replace, patch, change, exchange, move, other_kind])
def test_a_layer_that_is_changed_is_called_as_it_is(stepped, alter):
    """Whatever is done to one of its modules."""
    model, cache, ids = stepped
    before = logits_of(model, cache, ids, by_steps=True)
    alter(model.model.layers[1].self_attn)
    found = logits_of(model, cache, ids, by_steps=True)
    torch.testing.assert_close(found, logits_of(model, cache, ids, by_steps=False), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, before, rtol=1e-3)
    assert [step.is_same() for step in model.model.steps] == [True, False]


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
