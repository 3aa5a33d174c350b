"""int8 and int4 against torchao's own way back, and against the weight."""

import pytest
import torch
from torch.nn import functional as F
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)

from torchtune.errors import CheckpointError
from torchtune.quantization.int4 import Int4Weight
from torchtune.quantization.int8 import Int8Weight

KINDS = [(Int8Weight, 128, MappingType.SYMMETRIC, -127, 127), (Int4Weight, 64, MappingType.ASYMMETRIC, 0, 15)]
SHAPES = [(64, 96), (7, 9), (1, 1), (300, 129), (3, 64)]


def random_weight(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(0.05).add(0.01)


def as_torchao_has_it(weight, group, mapping, low, high):
    """Quantised and back in float32, in groups along the rows."""
    groups = F.pad(weight.reshape(-1), (0, -weight.numel() % group)).view(-1, group)
    block = (1, group)
    scale, zero = choose_qparams_affine(groups, mapping, block, torch.int8, low, high, scale_dtype=torch.bfloat16)
    codes = quantize_affine(groups, block, scale.float(), zero, torch.int8, low, high)
    dense = dequantize_affine(codes, block, scale.float(), zero, torch.int8, low, high)
    return dense.view(-1)[: weight.numel()].view(weight.shape), scale.float()


@pytest.mark.parametrize(("kind", "group", "mapping", "low", "high"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_those_of_torchao(kind, group, mapping, low, high, shape):
    """Bit for bit in float32 and float64; in bfloat16 and float16 these, rounded once."""
    weight = random_weight(*shape)
    expected, _ = as_torchao_has_it(weight, group, mapping, low, high)
    packed = kind.pack(weight)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert torch.equal(packed.dense(dtype), expected.to(dtype))


@pytest.mark.parametrize("kind", [Int8Weight, Int4Weight])
def test_float16_has_small_weights_too(kind):
    """Their scales are below its range; only the values are rounded to it."""
    packed = kind.pack(random_weight(8, 128) * 1e-4)
    assert torch.equal(packed.dense(torch.float16), packed.dense(torch.float32).half())


@pytest.mark.parametrize(("kind", "group", "mapping", "low", "high"), KINDS)
def test_no_weight_moves_by_more_than_a_step(kind, group, mapping, low, high):
    """Half a step by rounding; the rounded scale and zero point may cut off another half at the ends."""
    weight = random_weight(64, 128)
    _, scale = as_torchao_has_it(weight, group, mapping, low, high)
    moved = (kind.pack(weight).dense(torch.float32) - weight).view(-1, group).abs()
    assert (moved <= 1.01 * scale.view(-1, 1)).all()
    assert (moved <= 0.51 * scale.view(-1, 1)).float().mean() > 0.98


@pytest.mark.parametrize(("kind", "per_weight"), [(Int8Weight, 1.015625), (Int4Weight, 0.546875)])
def test_bytes_held(kind, per_weight):
    """Codes, and a scale (and zero point) a group."""
    weight = random_weight(256, 256)
    assert kind.pack(weight).held_bytes == per_weight * weight.numel()


@pytest.mark.parametrize("kind", [Int8Weight, Int4Weight])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_type_of_the_source_does_not_matter(kind, dtype):
    """What bfloat16 holds is quantised as if float32 held it."""
    weight = random_weight(16, 80).bfloat16().float()  # float16 holds these too: none is small
    weight = torch.where(weight.abs() < 1e-4, 0.0, weight)
    assert torch.equal(kind.pack(weight.to(dtype)).dense(torch.float32), kind.pack(weight).dense(torch.float32))


@pytest.mark.parametrize("kind", [Int8Weight, Int4Weight])
def test_a_slab_at_a_time_is_the_same(kind, monkeypatch):
    """Quantised in pieces, as large weights are."""
    weight = random_weight(50, 129)
    whole = kind.pack(weight)
    monkeypatch.setattr("torchtune.quantization.blocks.SLAB", 200)
    assert torch.equal(kind.pack(weight).dense(torch.float32), whole.dense(torch.float32))


@pytest.mark.parametrize("kind", [Int8Weight, Int4Weight])
def test_zeros_stay_zeros(kind):
    """A group of nothing else has no scale, and in any other zero has a code."""
    weight = torch.cat((torch.zeros(2, 128), random_weight(2, 128)))
    weight[3, ::2] = 0
    dense = kind.pack(weight).dense(torch.float32)
    assert not dense[:2].any()
    assert not dense[3, ::2].any()


@pytest.mark.parametrize("kind", [Int8Weight, Int4Weight])
@pytest.mark.parametrize(("value", "message"), [(float("nan"), "not finite"), (float("inf"), "not finite")])
def test_what_is_not_finite_is_refused(kind, value, message):
    """It would spoil its whole group."""
    weight = random_weight(4, 64)
    weight[1, 2] = value
    with pytest.raises(CheckpointError, match=message):
        kind.pack(weight)
