"""Fused low-rank updates against plain autograd, written out with F.linear in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from torchtune.adapters.fused import lora_linear, lora_linear_of_silu_product, lora_linears
from torchtune.adapters.low_rank import Adapted
from torchtune.modules.packed import PackedWeight

IN = 6


class Packed(PackedWeight):
    """Packed for the type's sake: what is read as a weight is -7, `dense` gives the values and counts its calls."""

    @staticmethod
    def of(values: Tensor) -> "Packed":
        packed = Tensor._make_subclass(Packed, torch.full_like(values, -7.0))
        packed.values, packed.calls = values, 0
        return packed

    def dense(self, dtype):
        self.calls += 1
        return self.values.to(dtype)


def adapted(in_features, out_features, rank, scale=0.7, *, bias="trained", transposed=False, dtype=torch.float64):
    """A layer whose update is as large as its base, so that no part can hide behind another."""
    shape = (in_features, out_features) if transposed else (out_features, in_features)
    values = torch.randn(out_features, dtype=dtype, requires_grad=bias == "trained") if bias else None
    lora_a = torch.randn(rank, in_features, dtype=dtype, requires_grad=True)
    lora_b = torch.randn(out_features, rank, dtype=dtype, requires_grad=True)
    return Adapted(torch.randn(shape, dtype=dtype), values, lora_a, lora_b, scale, transposed)


def plain(x, layer, adapter_input=None):
    weight = layer.weight.values if isinstance(layer.weight, Packed) else layer.weight
    output = F.linear(x, weight.T if layer.transposed else weight, layer.bias)
    if layer.lora_a is None:
        return output
    return (
        output
        + F.linear(F.linear(x if adapter_input is None else adapter_input, layer.lora_a), layer.lora_b) * layer.scale
    )


def plain_mlp(gate, up, layer):
    return plain(F.silu(gate) * up, layer)


def twin(value):
    """The same in float64, for the oracle; of a layer too."""
    if isinstance(value, Adapted):
        return value._replace(**{name: twin(getattr(value, name)) for name in ("weight", "bias", "lora_a", "lora_b")})
    if value is None or isinstance(value, Packed):
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def inputs(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def trained(*values):
    """All tensors in `values`, layers taken apart, that want a gradient."""
    flat = [part for value in values for part in (value[:4] if isinstance(value, Adapted) else (value,))]
    return [part for part in flat if part is not None and part.requires_grad]


def assert_same(outputs, expected, leaves, other_leaves, *, atol=1e-11):
    """Outputs and, from the same random gradients, all leaves' gradients, each in its leaf's type.

    `atol` is a share of the largest value.
    """
    grads = [torch.randn(output.shape, dtype=torch.float64).to(output.dtype) for output in outputs]
    torch.autograd.backward(outputs, grads)
    torch.autograd.backward(expected, [grad.double() for grad in grads])
    pairs = [*zip(outputs, expected, strict=True)]
    pairs += [(leaf.grad, other.grad) for leaf, other in zip(leaves, other_leaves, strict=True)]
    assert [leaf.grad.dtype for leaf in leaves] == [leaf.dtype for leaf in leaves]
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        largest = theirs.abs().max().item() if theirs.numel() else 0.0
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=atol * largest)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(5, IN), (2, 3, IN), (IN,), (1, IN), (0, IN)])
@pytest.mark.parametrize("bias", [None, "frozen", "trained"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_one_layer(shape, bias, transposed, apart):
    """Values and gradients, also where A sees another input than the weight, and for no token and one."""
    layer = adapted(IN, 4, 2, bias=bias, transposed=transposed)
    x, seen = inputs(*shape), inputs(*shape) if apart else None
    output = lora_linear(x, *layer[:5], transposed=transposed, adapter_input=seen)
    ours = trained(x, seen, layer)
    x, seen, layer = twin(x), twin(seen), twin(layer)
    assert_same([output], [plain(x, layer, seen)], ours, trained(x, seen, layer))


@pytest.mark.parametrize("rank", [1, 3, IN + 5])
def test_ranks(rank):
    """One, and more than the layer's inputs."""
    layer, x = adapted(IN, 4, rank), inputs(5, IN)
    other_x, other = twin(x), twin(layer)
    assert_same([lora_linear(x, *layer[:5])], [plain(other_x, other)], trained(x, layer), trained(other_x, other))


def group():
    """Ranks, scales, widths and layouts that all differ, and a layer without an update."""
    layers = [
        adapted(IN, 4, 3, 0.7),
        adapted(IN, 7, 1, 2.0, bias=None, transposed=True),
        adapted(IN, 5, IN + 2, 0.1, bias="frozen"),
        adapted(IN, 3, 1)._replace(lora_a=None, lora_b=None),
    ]
    return [layers[i] for i in (0, 3, 1, 2)]


@pytest.mark.parametrize("shape", [(5, IN), (2, 3, IN), (1, IN), (0, IN)])
def test_layers_of_one_input(shape):
    """Several layers together give what each gives alone, and x the sum of their gradients."""
    layers, x = group(), inputs(*shape)
    others, other_x = [twin(layer) for layer in layers], twin(x)
    expected = [plain(other_x, other) for other in others]
    assert_same(lora_linears(x, layers), expected, trained(x, *layers), trained(other_x, *others))


@pytest.mark.parametrize("used", [[0], [1], [3], [0, 2]])
def test_outputs_that_nothing_came_of(used):
    """Their parameters have no gradient, the others' are unchanged."""
    layers, x = group(), inputs(5, IN)
    others, other_x = [twin(layer) for layer in layers], twin(x)
    outputs = lora_linears(x, layers)
    sum(outputs[i].square().sum() for i in used).backward()
    sum(plain(other_x, others[i]).square().sum() for i in used).backward()
    for ours, theirs in zip(trained(x, *layers), trained(other_x, *others), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("shape", [(5, IN), (2, 3, IN), (1, IN), (0, IN)])
@pytest.mark.parametrize("bias", [None, "frozen", "trained"])
def test_layer_of_a_gated_product(shape, bias):
    """down(silu(gate) * up), without the product among what is kept."""
    layer, gate, up = adapted(IN, 4, 2, bias=bias), inputs(*shape), inputs(*shape)
    output = lora_linear_of_silu_product(gate, up, *layer[:5])
    ours = trained(gate, up, layer)
    gate, up, layer = twin(gate), twin(up), twin(layer)
    assert_same([output], [plain_mlp(gate, up, layer)], ours, trained(gate, up, layer))


def test_gradients_numerically():
    """By finite differences, all three functions."""
    first, second, x, up = adapted(IN, 4, 2), adapted(IN, 3, 1, 2.0, transposed=True), inputs(5, IN), inputs(5, IN)

    def one(x, seen, *parameters):
        return lora_linear(x, first.weight, *parameters, 0.7, adapter_input=seen)

    def two(x, *parameters):
        of_second = Adapted(second.weight, *parameters[3:], 2.0, True)
        return lora_linears(x, [Adapted(first.weight, *parameters[:3], 0.7), of_second])

    def gated(gate, up, *parameters):
        return lora_linear_of_silu_product(gate, up, first.weight, *parameters, 0.7)

    assert torch.autograd.gradcheck(one, (x, up, *first[1:4]))
    assert torch.autograd.gradcheck(two, (x, *first[1:4], *second[1:4]))
    assert torch.autograd.gradcheck(gated, (x, up, *first[1:4]))


def test_tensors_that_do_not_lie_in_order():
    """x is a permuted view, gate and up are halves of one matrix, gradients are spread out or transposed."""
    layer, x, both = adapted(IN, 4, 2), inputs(IN, 5, 3), inputs(5, 2 * IN)
    other, other_x, other_both = twin(layer), twin(x), twin(both)
    lora_linear(x.permute(2, 1, 0), *layer[:5]).sum().backward()
    plain(other_x.permute(2, 1, 0), other).sum().backward()
    grad = torch.randn(4, 5, dtype=torch.float64).T
    lora_linear_of_silu_product(*both.chunk(2, dim=-1), *layer[:5]).backward(grad)
    plain_mlp(*other_both.chunk(2, dim=-1), other).backward(grad)
    for ours, theirs in zip(trained(x, both, layer), trained(other_x, other_both, other), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_packed_weight(transposed):
    """It is unpacked once forward and once back, and what was unpacked is not kept."""
    layer, x = adapted(IN, 4, 2, transposed=transposed), inputs(5, IN)
    layer = layer._replace(weight=Packed.of(layer.weight))
    other, other_x = twin(layer), twin(x)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        outputs = lora_linears(x, [layer])
    assert layer.weight.calls == 1
    assert layer.weight.values.data_ptr() not in [tensor.data_ptr() for tensor in kept]
    assert_same(outputs, [plain(other_x, other)], trained(x, layer), trained(other_x, other))
    assert layer.weight.calls == 2


def test_a_packed_weight_of_a_gated_product():
    layer, gate, up = adapted(IN, 4, 2), inputs(5, IN), inputs(5, IN)
    layer = layer._replace(weight=Packed.of(layer.weight))
    output = lora_linear_of_silu_product(gate, up, *layer[:5])
    ours = trained(gate, up, layer)
    gate, up, other = twin(gate), twin(up), twin(layer)
    assert_same([output], [plain_mlp(gate, up, other)], ours, trained(gate, up, other))
    assert layer.weight.calls == 2


def test_float32_parameters_under_float64_inputs():
    """They are cast before anything is computed: the result is float64's, the gradients come back in float32."""
    layer, x = adapted(IN, 4, 2, 1 / 3, dtype=torch.float32), inputs(5, IN)
    output = lora_linear(x, *layer[:5])
    torch.testing.assert_close(output, plain(x, twin(layer)), rtol=0, atol=1e-12)
    other, other_x = twin(layer), twin(x)
    # A float32 gradient is off by half a step of its own.
    assert_same([output], [plain(other_x, other)], trained(x, layer), trained(other_x, other), atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_half_precision(dtype, weight_dtype):
    """Inputs in half, masters in float32: within a few roundings of float64, each gradient in its own type."""
    sizes = ((32, 32, 4), (32, 16, 8), (16, 32, 4))
    layers = [adapted(*size, dtype=torch.float32) for size in sizes]
    layers = [layer._replace(weight=layer.weight.to(weight_dtype)) for layer in layers]
    x, up = inputs(50, 32, dtype=dtype), inputs(50, 16, dtype=dtype)
    others, other_x, other_up = [twin(layer) for layer in layers], twin(x), twin(up)
    wide, gate = lora_linears(x, layers[:2])
    output = lora_linear_of_silu_product(gate / 16, up, *layers[2][:5])
    other_wide, other_gate = plain(other_x, others[0]), plain(other_x, others[1])
    expected = plain_mlp(other_gate / 16, other_up, others[2])
    leaves, other_leaves = trained(x, up, *layers), trained(other_x, other_up, *others)
    steps = 6 * torch.finfo(dtype).eps  # of the largest value: parameters, products and sums are each rounded
    assert_same([wide, output], [other_wide, expected], leaves, other_leaves, atol=steps)


def test_float16_sums_stay_in_range():
    """A scale below one acts before B's gradient is rounded: the bare sum is beyond float16, the scaled one is not."""
    layer = adapted(8, 8, 2, 0.01, bias=None, dtype=torch.float32)
    x = inputs(512, 8, dtype=torch.float16)
    grad = torch.full((512, 8), 400.0, dtype=torch.float16)
    with torch.no_grad():
        layer.lora_a.copy_(2.0)
        x.copy_(x.abs())
    lora_linear(x, *layer[:5]).backward(grad)
    other, other_x = twin(layer), twin(x)
    plain(other_x, other).backward(grad.double())
    assert other.lora_b.grad.max() / layer.scale > torch.finfo(torch.float16).max
    torch.testing.assert_close(layer.lora_b.grad, other.lora_b.grad.float(), rtol=2e-3, atol=0)


def saved_bytes(function, *owned):
    """What autograd keeps of `function`'s forward pass beside tensors that are there anyway, and its outputs."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = function()
    there = {tensor.untyped_storage().data_ptr() for tensor in owned}
    return sum(size for pointer, size in kept.items() if pointer not in there), outputs


def test_what_is_kept():
    """Of a group [T, R], of a gated product [T, r], and nothing else that was not there; plain autograd keeps more."""
    tokens, size, ranks = 50, 4, (2, 3)
    layers = [adapted(32, 64, rank, dtype=torch.float32) for rank in ranks]
    down = adapted(64, 32, 2, dtype=torch.float32)
    x = inputs(tokens, 32, dtype=torch.float32)
    parameters = [tensor for layer in (*layers, down) for tensor in layer[:4]]
    kept, (gate, up) = saved_bytes(lambda: lora_linears(x, layers), x, *parameters)
    assert kept == tokens * sum(ranks) * size
    kept, _ = saved_bytes(lambda: lora_linear_of_silu_product(gate, up, *down[:5]), gate, up, *parameters)
    assert kept == tokens * 2 * size
    kept, _ = saved_bytes(lambda: plain_mlp(gate, up, down), gate, up, *parameters)
    assert kept >= tokens * (2 + 2 * 64) * size  # silu(gate), and the product


def test_half_precision_keeps_no_casts():
    """What was cast for the product is cast again."""
    layer, x = adapted(32, 64, 4, dtype=torch.float32), inputs(50, 32, dtype=torch.bfloat16)
    kept, _ = saved_bytes(lambda: lora_linear(x, *layer[:5]), x, *layer[:4])
    assert kept == 50 * 4 * 2


@pytest.mark.parametrize("frozen", ["x", "lora_a", "lora_b"])
def test_what_needs_no_gradient(frozen):
    """The first adapted layer's input, or a frozen factor: none is made, and what only it needed is not kept."""
    layers, x = [adapted(IN, 4, 2), adapted(IN, 4, 3)], inputs(5, IN)
    for tensor in [x] if frozen == "x" else [getattr(layer, frozen) for layer in layers]:
        tensor.requires_grad_(False)
    others, other_x = [twin(layer) for layer in layers], twin(x)
    parameters = [tensor for layer in layers for tensor in layer[:4]]
    kept, outputs = saved_bytes(lambda: lora_linears(x, layers), *parameters)
    of_x, of_low = (5 * width * 8 for width in (IN, 5))
    assert kept == {"x": of_x + of_low, "lora_a": of_low, "lora_b": of_x}[frozen]
    expected = [plain(other_x, other) for other in others]
    assert_same(outputs, expected, trained(x, *layers), trained(other_x, *others))


def test_a_gated_product_of_what_needs_no_gradient():
    """Gate alone, up alone, or the factors alone."""
    for wanted in ({"gate"}, {"up"}, {"lora_a"}, {"lora_b"}):
        layer, gate, up = adapted(IN, 4, 2, bias=None), inputs(5, IN), inputs(5, IN)
        for name, tensor in (("gate", gate), ("up", up), ("lora_a", layer.lora_a), ("lora_b", layer.lora_b)):
            tensor.requires_grad_(name in wanted)
        output = lora_linear_of_silu_product(gate, up, *layer[:5])
        ours = trained(gate, up, layer)
        gate, up, layer = twin(gate), twin(up), twin(layer)
        assert_same([output], [plain_mlp(gate, up, layer)], ours, trained(gate, up, layer))


@pytest.mark.parametrize("frozen", [False, True])
def test_the_adapters_input_alone_needs_a_gradient(frozen):
    """Not x; and the layer's parameters too, or not."""
    layer, x, seen = adapted(IN, 4, 2), inputs(5, IN).detach(), inputs(5, IN)
    for tensor in layer[1:4] if frozen else ():
        tensor.requires_grad_(False)
    other, other_seen = twin(layer), twin(seen)
    output = lora_linear(x, *layer[:5], adapter_input=seen)
    assert_same([output], [plain(x, other, other_seen)], trained(seen, layer), trained(other_seen, other))


def test_without_gradients_nothing_is_kept():
    layer, x = adapted(IN, 4, 2), inputs(5, IN)
    with torch.no_grad():
        kept, (output,) = saved_bytes(lambda: lora_linears(x, [layer]))
    assert kept == 0
    assert not output.requires_grad


def test_a_trained_weight_is_refused():
    """Its gradient would be missing without a word."""
    layer, x = adapted(IN, 4, 2), inputs(5, IN)
    layer.weight.requires_grad_()
    for call in (
        lambda: lora_linear(x, *layer[:5]),
        lambda: lora_linears(x, [layer]),
        lambda: lora_linear_of_silu_product(x, x, *layer[:5]),
    ):
        with pytest.raises(ValueError, match="frozen"):
            call()


def test_half_an_update_is_refused():
    layer, x = adapted(IN, 4, 2), inputs(5, IN)
    with pytest.raises(ValueError, match="lora_a is given and lora_b is None"):
        lora_linear(x, layer.weight, None, layer.lora_a, None, 1.0)
    with pytest.raises(ValueError, match="lora_b is given and lora_a is None"):
        lora_linear_of_silu_product(x, x, layer.weight, None, None, layer.lora_b, 1.0)


def test_a_second_derivative_is_refused():
    """Backward passes work in place, so autograd must not go through them."""
    layer, x = adapted(IN, 4, 2), inputs(5, IN)
    (grad,) = torch.autograd.grad(lora_linear(x, *layer[:5]).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def gated_mlp(x, gate, up, down):
    return lora_linear_of_silu_product(*lora_linears(x, [gate, up]), *down[:5])


def mlp_layers():
    return adapted(IN, 8, 2), adapted(IN, 8, 3), adapted(8, IN, 2)


def test_activation_checkpointing():
    """The whole gated MLP made again in the backward pass, to the same bits."""
    layers, x = mlp_layers(), inputs(5, IN)
    gated_mlp(x, *layers).square().sum().backward()
    expected = [leaf.grad for leaf in trained(x, *layers)]
    for leaf in trained(x, *layers):
        leaf.grad = None
    kept, output = saved_bytes(lambda: checkpoint(gated_mlp, x, *layers, use_reentrant=False), x)
    assert kept == 0
    output.square().sum().backward()
    for leaf, grad in zip(trained(x, *layers), expected, strict=True):
        assert torch.equal(leaf.grad, grad)


class Layer(torch.nn.Module):
    """A layer's tensors as a model holds them."""

    def __init__(self, layer):
        super().__init__()
        for name, tensor in layer._asdict().items():
            is_tensor = isinstance(tensor, Tensor)
            setattr(self, name, torch.nn.Parameter(tensor, tensor.requires_grad) if is_tensor else tensor)

    def forward(self):
        return Adapted(self.weight, self.bias, self.lora_a, self.lora_b, self.scale)


class GatedMLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = (Layer(layer) for layer in mlp_layers())

    def forward(self, x):
        return gated_mlp(x, self.gate(), self.up(), self.down())


@pytest.mark.slow
def test_compiled():
    """torch.compile with sizes that change traces it whole: values and gradients are those without it."""
    module = GatedMLP()
    compiled = torch.compile(module, dynamic=True, fullgraph=True)
    for length in (5, 9, 1):
        x = inputs(length, IN)
        results = []
        for function in (compiled, module):
            leaves = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
            output = function(x)
            results.append((output, torch.autograd.grad(output.square().sum(), leaves)))
        torch.testing.assert_close(*results)
