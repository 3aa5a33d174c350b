"""Packed weights in layers, and as parameters of a model, whatever their kind."""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from torchtune.errors import UnsupportedError
from torchtune.modules.feed_forward import FeedForward
from torchtune.modules.grouped import grouped_linear
from torchtune.modules.linear import Conv1D, Linear
from torchtune.modules.moe import Experts, gated_by
from torchtune.modules.packed import PackedWeight, dense
from torchtune.modules.packed import unpacked as values_of
from torchtune.quantization.int4 import Int4Weight
from torchtune.quantization.int8 import Int8Weight
from torchtune.quantization.nf4 import NF4Weight

KINDS = [NF4Weight, Int8Weight, Int4Weight]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]

pytestmark = pytest.mark.parametrize("kind", KINDS)


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def pack_parameters(module, kind, names):
    for name in names:
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        setattr(owner, last, nn.Parameter(kind.pack(getattr(owner, last)), requires_grad=False))
    return module


def unpacked(module):
    """A copy of the module with plain weights that have the packed ones' values, in float64."""
    plain = copy.deepcopy(module)
    for owner in plain.modules():
        for name, weight in list(owner.named_parameters(recurse=False)):
            if isinstance(weight, PackedWeight):
                matrices = [weight] if weight.dim() == 2 else [weight[e] for e in range(len(weight))]
                values = torch.stack([each.dense(torch.float64) for each in matrices]).view(weight.shape)
                setattr(owner, name, nn.Parameter(values, requires_grad=False))
    return plain


@contextmanager
def kept_for_backward():
    """The tensors that are kept meanwhile."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda x: x):
        yield kept


def output_and_gradients(module, x):
    """The output, and the gradients of x and of all that is trained."""
    x = x.clone().requires_grad_()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    out = module(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *trained], random(*out.shape, dtype=out.dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", [Linear, Conv1D])
def test_a_linear_layer_is_that_of_the_dense_weight(kind, layer, dtype):
    """Output and gradients; the bias is trained, the weight has none."""
    packed = pack_parameters(layer(36, 20).to(torch.promote_types(dtype, torch.float32)), kind, ["weight"])
    x = random(5, 36, dtype=dtype)
    plain = output_and_gradients(unpacked(packed).double(), x.double())
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    for ours, theirs in zip(output_and_gradients(packed, x), plain, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    packed(x.clone().requires_grad_()).sum().backward()
    assert packed.weight.grad is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_feed_forward_is_that_of_the_dense_weights(kind, dtype):
    """Through the node that makes silu(gate) * up again."""
    names = [f"{name}_proj.weight" for name in ("gate", "up", "down")]
    packed = pack_parameters(FeedForward(24, 40).requires_grad_(False), kind, names)
    x = random(5, 24, dtype=dtype)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    plain = output_and_gradients(unpacked(packed), x.double())
    for ours, theirs in zip(output_and_gradients(packed, x), plain, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_are_those_of_the_dense_weights(kind, transposed, dtype):
    """Each expert is packed for itself; sizes that are no multiple of a block, and an expert without a token."""
    experts = Experts(3, 10, 14, gated=gated_by("silu"), transposed=transposed).requires_grad_(False)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    packed = pack_parameters(experts, kind, ["gate_up_proj", "down_proj"])
    chosen, weights = torch.tensor([[0], [2], [2], [0], [2]]), torch.rand(5, 1, dtype=torch.float64)
    x = random(5, 10, dtype=dtype)
    plain = unpacked(packed)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    ours, theirs = [], []
    for module, results, rows in ((packed, ours, x), (plain, theirs, x.double())):
        rows = rows.clone().requires_grad_()
        out = module(rows, weights.to(rows.dtype), chosen)
        (grad,) = torch.autograd.grad(out, rows, random(*out.shape, dtype=out.dtype))
        results += [out.detach().double(), grad.double()]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * other.abs().max().item())


class LargestFloats(TorchDispatchMode):
    """The largest result of floats that any operator gives meanwhile."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_new = isinstance(result, torch.Tensor) and not isinstance(result, PackedWeight) and not func.is_view
        if is_new and result.dtype.is_floating_point:
            self.num_elements = max(self.num_elements, result.numel())
        return result


def test_a_stack_is_never_unpacked_whole(kind):
    """Not packing it, nor in the forward and backward pass; asked for whole it refuses."""
    stack = random(8, 64, 64)
    with LargestFloats() as seen:
        packed = kind.pack(stack)
    assert seen.num_elements <= 64 * 64
    x = random(16, 64).requires_grad_()
    with LargestFloats() as seen:
        grouped_linear(x, packed, torch.full((8,), 2)).sum().backward()
    assert seen.num_elements <= 64 * 64
    with pytest.raises(UnsupportedError, match=r"weight\[e\]"):
        packed.dense(torch.float32)


def test_a_source_is_quantised_piece_by_piece(kind, monkeypatch):
    """A bfloat16 weight has no float32 copy, and what quantising takes does not grow with it."""
    weight = random(256, 128).bfloat16()
    monkeypatch.setattr("torchtune.quantization.blocks.SLAB", 1024)
    with LargestFloats() as seen:
        kind.pack(weight)
    assert seen.num_elements <= 1024


def test_a_stack_is_packed_matrix_by_matrix(kind):
    """Also where a matrix is no multiple of a block."""
    stack = random(3, 5, 9)
    packed = kind.pack(stack)
    for expert in range(3):
        assert packed[expert].shape == (5, 9)
        assert torch.equal(packed[expert].dense(torch.float32), kind.pack(stack[expert]).dense(torch.float32))


def test_memory_order_does_not_matter(kind):
    """A transposed source is packed by its logical rows."""
    weight = random(40, 24)
    assert torch.equal(kind.pack(weight.T).dense(torch.float32), kind.pack(weight.T.contiguous()).dense(torch.float32))


def test_nothing_dense_is_kept_for_the_backward_pass(kind):
    """The packed weight is, and the input is not."""
    layer = pack_parameters(Linear(64, 32, bias=False), kind, ["weight"])
    with kept_for_backward() as kept:
        layer(random(5, 64).requires_grad_())
    assert [type(tensor) for tensor in kept] == [kind]


def test_checkpointing_recomputes_it(kind):
    """The same gradients from a layer that is run again in the backward pass."""
    layer = pack_parameters(Linear(36, 20), kind, ["weight"])
    x = random(5, 36)

    class Recomputed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return checkpoint(self.layer, x, use_reentrant=False)

    for ours, theirs in zip(output_and_gradients(Recomputed(), x), output_and_gradients(layer, x), strict=True):
        assert torch.equal(ours, theirs)


class Product(torch.autograd.Function):
    """x @ weight.T, written as layers are to be."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ dense(weight, x.dtype).T

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return grad @ dense(weight, grad), None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_is_the_same_and_nothing_dense_is_kept(kind, dtype):
    """For lengths that change, in one graph; `dense` is given the gradient in the backward pass."""
    torch.compiler.reset()
    weight = nn.Parameter(kind.pack(random(40, 72)), requires_grad=False)
    compiled = torch.compile(lambda x: Product.apply(torch.sin(x), weight), dynamic=True, fullgraph=True)
    for num_tokens in (5, 9):
        x = random(num_tokens, 72, dtype=dtype).requires_grad_()
        with kept_for_backward() as kept:
            out = compiled(x)
        assert not [tensor for tensor in kept if tensor.dtype.is_floating_point and tensor.shape[0] != num_tokens]
        (grad,) = torch.autograd.grad(out.sum(), x)
        x_again = x.detach().requires_grad_()
        expected = Product.apply(torch.sin(x_again), weight)
        (expected_grad,) = torch.autograd.grad(expected.sum(), x_again)
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(grad, expected_grad, rtol=tolerance, atol=tolerance)


def test_a_layer_compiles(kind):
    """A Linear as it is, in place, for lengths that change."""
    torch.compiler.reset()
    layer = pack_parameters(Linear(36, 20), kind, ["weight"])
    inputs = [random(length, 36) for length in (5, 9)]
    expected = [output_and_gradients(layer, x) for x in inputs]
    layer.compile(dynamic=True, fullgraph=True)
    for x, theirs in zip(inputs, expected, strict=True):
        torch.testing.assert_close(output_and_gradients(layer, x), theirs, rtol=1e-5, atol=1e-5)


def test_it_is_a_parameter_like_others(kind):
    """Found by its name with the dense shape and type, copied, moved, and frozen all the while."""
    layer = pack_parameters(Linear(36, 20), kind, ["weight"])
    values = layer.weight.dense(torch.float32)
    assert dict(layer.named_parameters())["weight"] is layer.weight
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.numel()) == ((20, 36), torch.float32, 720)
    for other in (copy.deepcopy(layer), copy.deepcopy(layer).to("cpu", torch.bfloat16), copy.deepcopy(layer).double()):
        weight = other.weight
        assert isinstance(weight, kind)
        assert isinstance(weight, nn.Parameter)
        assert not weight.requires_grad
        assert torch.equal(weight.dense(torch.float32), values)
        for name in weight.part_names:
            assert getattr(weight, name).data_ptr() != getattr(layer.weight, name).data_ptr()
    assert other.weight.dtype == torch.float64
    assert layer.to("meta").weight.codes.is_meta
    assert repr(weight) == f"{kind.__name__}([20, 36], torch.float64, device='cpu')"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_moves_to_the_gpu(kind):
    """And has its values there."""
    weight = kind.pack(random(40, 36))
    there = weight.to("cuda")
    for dtype in (torch.float32, torch.bfloat16):
        torch.testing.assert_close(there.dense(dtype).cpu(), weight.dense(dtype), rtol=0.01, atol=1e-6)
    assert torch.equal(there.cpu().dense(torch.float32), weight.dense(torch.float32))
    torch.testing.assert_close(kind.pack(random(40, 36).cuda()).dense(torch.float32).cpu(), weight.dense(torch.float32))


@pytest.mark.parametrize("shape", [(4, 64), (6, 36), (4, 5, 9), (768, 64)])
def test_rows_of_several_ranks_are_put_together(kind, shape):
    """As FSDP gathers what each rank has packed: also where blocks are filled up, and matrices of a stack."""
    shares = [kind.pack(share) for share in random(*shape).chunk(2)]
    inputs, (metadata, _) = zip(
        *[share.fsdp_pre_all_gather(None, torch.Size(shape), None, None, None) for share in shares], strict=True
    )
    outputs = [
        torch.cat([part.view(-1) for part in of_ranks]).view(-1, *of_ranks[0].shape[1:])
        for of_ranks in zip(*inputs, strict=True)
    ]
    gathered, _ = shares[0].fsdp_post_all_gather(outputs, metadata, torch.bfloat16)
    assert (type(gathered), gathered.shape, gathered.dtype) == (kind, shape, torch.bfloat16)
    expected = torch.cat([values_of(share, torch.float32) for share in shares])
    assert torch.equal(values_of(gathered, torch.float32), expected)


def test_it_is_pinned_as_it_is(kind, monkeypatch):
    """What FSDP keeps in the host's memory; there is no such memory without an accelerator, so it is a copy here."""
    weight = kind.pack(random(20, 36))
    assert not torch.ops.aten.is_pinned.default(weight)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    pinned = torch.ops.aten._pin_memory.default(weight).narrow(0, 0, 20)
    assert torch.equal(pinned.dense(torch.float32), weight.dense(torch.float32))
    assert pinned.codes.data_ptr() != weight.codes.data_ptr()


def test_it_is_not_unpacked_unnoticed(kind):
    """What is no layer's is refused, by the weight's name and what to do."""
    weight = kind.pack(random(20, 36))
    refused = [
        lambda: weight + 1,
        lambda: weight @ random(36, 2),
        lambda: random(2, 20) @ weight,
        lambda: weight.T,
        lambda: weight[0],
        lambda: weight[:, 1],
        lambda: weight[:, :5],
        lambda: weight[1:],
        lambda: weight[:19],
        lambda: weight.view(36, 20),
        lambda: weight.as_strided((20, 36), (1, 20)),
        lambda: torch.stack([weight]),
        lambda: weight.copy_(random(20, 36)),
        lambda: random(20, 36).copy_(weight),
        lambda: weight.to(torch.int8),
        lambda: nn.Parameter(weight),
        lambda: weight.requires_grad_(),
        lambda: kind.pack(weight),
    ]
    for ask in refused:
        with pytest.raises(UnsupportedError, match=kind.__name__ if ask is not refused[-1] else "already"):
            ask()


def test_loading_into_it_is_refused(kind):
    """A state dictionary has dense values; the error names the parameter."""
    layer = pack_parameters(Linear(36, 20, bias=False), kind, ["weight"])
    with pytest.raises(RuntimeError, match=rf'"weight".*{kind.__name__}.*packed'):
        layer.load_state_dict({"weight": random(20, 36)})


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(3), "must be a matrix"),
        (torch.zeros(2, 3, dtype=torch.int64), "must be a matrix of floats"),
        (torch.zeros(2, 0), "no element"),
        (torch.zeros(2, 3, device="meta"), "no values"),
    ],
)
def test_what_is_no_weight_is_refused(kind, weight, message):
    """By what is wrong with it."""
    with pytest.raises(UnsupportedError, match=message):
        kind.pack(weight)
