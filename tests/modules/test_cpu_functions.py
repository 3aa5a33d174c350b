"""The hand-written autograd functions against plain autograd."""

import pytest
import torch
from torch.nn import functional as F

from torchtune.modules.attend import Scores, attend, hide_from_compiler
from torchtune.modules.documents import Documents
from torchtune.modules.feed_forward import FeedForward
from torchtune.modules.linear import Linear
from torchtune.modules.losses import LinearCrossEntropy
from torchtune.modules.norms import RMSNorm


def plain_attention(q, k, v, documents, scale, window, softcap=None, sinks=None):
    """Each document by explicit products and a mask."""
    group = q.shape[1] // k.shape[1]
    parts = []
    for start, end in documents.bounds:
        queries = q[start:end].transpose(0, 1)
        keys = k[start:end].repeat_interleave(group, 1).transpose(0, 1)
        values = v[start:end].repeat_interleave(group, 1).transpose(0, 1)
        place = torch.arange(end - start)
        hidden = place[None] > place[:, None]
        if window is not None:
            hidden |= place[None] <= place[:, None] - window
        scores = queries @ keys.transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat((scores, sinks[:, None, None].expand(-1, end - start, 1)), dim=-1)
        weights = scores.softmax(-1)[..., : end - start]
        parts.append((weights @ values).transpose(0, 1))
    return torch.cat(parts)


def leaves(num_tokens, num_heads, num_kv_heads, dtype, head_dim=8):
    torch.manual_seed(0)
    shapes = [(num_tokens, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


# Lengths below, at and above the group steps of 32 and the group limit of 128.
LENGTHS = [3, 1, 31, 32, 33, 64, 127, 128, 129, 200]


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 0.5])
def test_attention_in_float64(num_kv_heads, window, softcap):
    """Values and gradients of q, k and v, grouped heads, windows and soft caps."""
    documents = Documents.from_lengths(LENGTHS)
    ours = leaves(documents.num_tokens, 4, num_kv_heads, torch.float64)
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    out = attend(*ours, documents, Scores(0.3, window, softcap=softcap))
    expected = plain_attention(*theirs, documents, 0.3, window, softcap)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("num_kv_heads", [1, 4])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_with_sinks(num_kv_heads, window, dtype):
    """A score a head that takes part in the softmax: values, and gradients of the sinks too."""
    documents = Documents.from_lengths(LENGTHS)
    ours = [*leaves(documents.num_tokens, 4, num_kv_heads, dtype), torch.tensor([-2.0, 0.0, 1.0, 4.0], dtype=dtype)]
    ours[-1].requires_grad_()
    theirs = [tensor.detach().double().requires_grad_() for tensor in ours]
    out = attend(*ours[:3], documents, Scores(0.3, window), sinks=ours[3])
    expected = plain_attention(*theirs[:3], documents, 0.3, window, sinks=theirs[3])
    grad = torch.randn(out.shape, dtype=torch.float64).to(dtype)
    out.backward(grad)
    expected.backward(grad.double())
    steps = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=steps * expected.abs().max().item())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=0, atol=steps * other.grad.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_kv_heads", [1, 3])
def test_grouped_attention_in_half_precision(dtype, num_kv_heads):
    """Short documents go through plain products in groups: within a few roundings of float64 from the same inputs."""
    documents = Documents.from_lengths(LENGTHS)
    ours = leaves(documents.num_tokens, 3, num_kv_heads, dtype)
    theirs = [tensor.detach().double().requires_grad_() for tensor in ours]
    out = attend(*ours, documents, Scores(0.3))
    expected = plain_attention(*theirs, documents, 0.3, None)
    grad = torch.randn(out.shape, dtype=torch.float64).to(dtype)
    out.backward(grad)
    expected.backward(grad.double())
    steps = 4 * torch.finfo(dtype).eps  # of the largest value: rounding of weights, products and sums
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=steps * expected.abs().max().item())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=0, atol=steps * other.grad.abs().max().item())


@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_document_is_unchanged_by_its_neighbours(requires_grad):
    """Packing must be invisible, in a group of short documents too."""
    q, k, v = (tensor.requires_grad_(requires_grad) for tensor in leaves(60, 4, 2, torch.bfloat16))
    packed = attend(q, k, v, Documents.from_lengths([20, 7, 33]), Scores(0.3))
    changed = [tensor.detach().clone() for tensor in (q, k, v)]
    for tensor in changed:
        tensor[:20] = 7.0
        tensor[27:] = -7.0
        tensor.requires_grad_(requires_grad)
    assert torch.equal(attend(*changed, Documents.from_lengths([20, 7, 33]), Scores(0.3))[20:27], packed[20:27])


@pytest.mark.parametrize("scores", [Scores(0.3), Scores(0.3, 5), Scores(0.3, chunk=7), Scores(0.3, softcap=2.0)])
def test_attention_is_not_compiled_anew_for_other_lengths(scores):
    """Each batch has others."""
    hide_from_compiler()
    compiled = torch.compile(lambda *args: attend(*args, scores), dynamic=True, backend="eager")
    q, k, v = leaves(60, 4, 2, torch.float32)
    with torch.no_grad():
        compiled(q, k, v, Documents.from_lengths([20, 7, 33]))
        with torch.compiler.set_stance("fail_on_recompile"):
            found = compiled(q, k, v, Documents.from_lengths([5, 55]))
        assert found.equal(attend(q, k, v, Documents.from_lengths([5, 55]), scores))


@pytest.mark.parametrize("num_rows", [0, 1, 5, 64])
def test_linear_cross_entropy_in_float64(num_rows):
    """The sum and both gradients, in chunks, equal plain cross-entropy."""
    torch.manual_seed(0)
    hidden = torch.randn(num_rows, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (num_rows,))
    loss = LinearCrossEntropy(chunk_size=7)(hidden, weight, targets)
    (loss / 3).backward()
    other_hidden, other_weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    expected = F.cross_entropy(other_hidden @ other_weight.T, targets, reduction="sum")
    (expected / 3).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(hidden.grad, other_hidden.grad)
    if num_rows:
        torch.testing.assert_close(weight.grad, other_weight.grad)


def test_linear_cross_entropy_of_a_frozen_head():
    """No gradient of the weight is made, that of the hidden states is the same; evaluation makes none at all."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 6, requires_grad=True), torch.randn(11, 6)
    targets = torch.randint(0, 11, (5,))
    LinearCrossEntropy()(hidden, weight, targets).backward()
    expected = hidden.detach().requires_grad_()
    F.cross_entropy(expected @ weight.T, targets, reduction="sum").backward()
    torch.testing.assert_close(hidden.grad, expected.grad)
    with torch.no_grad():
        assert not LinearCrossEntropy()(hidden, weight, targets).requires_grad


def test_rms_norm_gradients():
    """Checked numerically in float64, and against torch's in value."""
    torch.manual_seed(0)
    norm = RMSNorm(6, 1e-5).double()
    torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    x = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (6,), norm.weight, 1e-5))

    def by_weight(value, weight):
        norm.weight.data.copy_(weight.detach())
        return torch.func.functional_call(norm, {"weight": weight}, (value,))

    assert torch.autograd.gradcheck(by_weight, (x, norm.weight.detach().clone().requires_grad_()))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_weight_that_is_cast_on_the_way(bias, frozen):
    """float32 weights under float64 inputs: values and gradients of plain autograd, each gradient in its own type."""
    torch.manual_seed(0)
    layer = Linear(6, 5, bias=bias)
    layer.weight.requires_grad_(not frozen)
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    weight = layer.weight.detach().double().requires_grad_()
    expected = F.linear(other, weight, layer.bias.detach().double() if bias else None)
    out = layer(x)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(x.grad, other.grad)
    if frozen:
        assert layer.weight.grad is None
    else:
        torch.testing.assert_close(layer.weight.grad, weight.grad.float())
    if bias:
        torch.testing.assert_close(layer.bias.grad, grad.sum((0, 1)).float())


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gated_feed_forward(dtype, hooked):
    """down(silu(gate) * up) in float64 from float64 or float32 weights, also where something hooks into down_proj."""
    torch.manual_seed(0)
    block = FeedForward(6, 10).to(dtype)
    seen = []
    if hooked:
        block.down_proj.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    named = {name: value.detach().double().requires_grad_() for name, value in block.named_parameters()}
    gate, up, down = (named[f"{name}_proj.weight"] for name in ("gate", "up", "down"))
    expected = (F.silu(other @ gate.T) * (other @ up.T)) @ down.T
    out = block(x)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(x.grad, other.grad)
    for name, value in block.named_parameters():
        torch.testing.assert_close(value.grad, named[name].grad.to(dtype))
    assert bool(seen) == hooked
