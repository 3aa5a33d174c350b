"""NF4 against bitsandbytes' own, and against torchao's."""

import bitsandbytes
import bitsandbytes.functional
import pytest
import torch
from torch.nn import functional as F
from torchao.quantization import NF4Tensor

from torchtune.errors import CheckpointError
from torchtune.quantization.nf4 import NF4Weight

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_weight(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(0.05).to(dtype)


def as_bitsandbytes_has_it(matrix, dtype, *, double):
    """Its quantisation and back, of blocks, since rows of an odd length would be compiled there."""
    blocks = F.pad(matrix.reshape(-1), (0, -matrix.numel() % 64)).view(-1, 64)
    codes, state = bitsandbytes.functional.quantize_4bit(blocks, quant_type="nf4", compress_statistics=double)
    state.dtype = dtype
    dense = bitsandbytes.functional.dequantize_4bit(codes, state)
    return dense.view(-1)[: matrix.numel()].view(matrix.shape)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("held", TYPES)
@pytest.mark.parametrize("shape", [(64, 96), (7, 9), (1, 1), (300, 129)])
def test_values_are_those_of_bitsandbytes(shape, held, dtype, double):
    """Bit for bit, for any shape, whatever type the source has."""
    weight = random_weight(*shape, dtype=held)
    packed = NF4Weight.pack(weight, double_quantization=double)
    assert torch.equal(packed.dense(dtype), as_bitsandbytes_has_it(weight, dtype, double=double))


@pytest.mark.parametrize("double", [True, False])
def test_values_are_those_of_its_linear_layer(double):
    """A base that its users have: Params4bit, quantised on the move to the device."""
    weight = random_weight(96, 128)
    theirs = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=double)
    theirs = theirs.to("cpu")
    expected = bitsandbytes.functional.dequantize_4bit(theirs.data, theirs.quant_state)
    assert torch.equal(NF4Weight.pack(weight, double_quantization=double).dense(torch.float32), expected)


def test_values_are_near_those_of_torchao():
    """Blocks' magnitudes are quantised otherwise there, within a hundredth; a weight between two codes may take either."""
    weight = random_weight(128, 128)
    ours, theirs = NF4Weight.pack(weight), NF4Tensor.from_tensor(weight, 64, 256)
    largest = weight.view(-1, 64).abs().amax(1, keepdim=True)
    differences = (ours.dense(torch.float32) - theirs.get_original_weight()).view(-1, 64).abs()
    assert (differences <= 0.01 * largest).float().mean() > 0.999


def test_a_slab_at_a_time_is_the_same(monkeypatch):
    """Quantised in pieces, as large weights are."""
    weight = random_weight(50, 129)
    whole = NF4Weight.pack(weight)
    monkeypatch.setattr("torchtune.quantization.blocks.SLAB", 200)
    assert torch.equal(NF4Weight.pack(weight).dense(torch.float32), whole.dense(torch.float32))


def test_float64_is_taken_and_given():
    """The values of float32, which is what the format has."""
    weight = random_weight(8, 64)
    packed = NF4Weight.pack(weight.double())
    assert packed.dense(torch.float64).dtype == torch.float64
    assert torch.equal(packed.dense(torch.float64), NF4Weight.pack(weight).dense(torch.float32).double())


def test_bytes_held():
    """0.53 bytes a weight at most with double quantisation, beside the map of 256 values; 0.5625 without."""
    weight = random_weight(256, 256)
    assert NF4Weight.pack(weight).held_bytes - 4 * 256 <= 0.53 * weight.numel()
    assert NF4Weight.pack(weight, double_quantization=False).held_bytes == 0.5625 * weight.numel()


def test_zeros_stay_zeros():
    """Also by double quantisation, which moves a block's magnitude away from 0."""
    weight = torch.cat((torch.zeros(2, 64), random_weight(2, 64)))
    assert not NF4Weight.pack(weight).dense(torch.float32)[:2].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value):
    """It would spoil the 63 weights beside it."""
    weight = random_weight(4, 64)
    weight[1, 2] = value
    with pytest.raises(CheckpointError, match="not finite"):
        NF4Weight.pack(weight)
