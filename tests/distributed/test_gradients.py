"""The sum of gradients over an axis, in buckets."""

import pytest
import torch
from torch import nn

from torchtune.distributed.gradients import sum_gradients
from torchtune.distributed.mesh import MeshSizes, open_mesh

SHAPES = [(3,), (40, 7), (2, 2), (1,), (5, 4), (30, 30), (6,)]


def gradient(index, rank):
    generator = torch.Generator().manual_seed(10 * index + rank)
    return torch.randn(SHAPES[index], generator=generator)


def summed(bucket_bytes, dtype):
    """The gradients of a model, some missing on one rank, one transposed in memory, one frozen."""
    with pytest.MonkeyPatch.context() as patched, open_mesh(MeshSizes(), torch.device("cpu")) as mesh:
        patched.setattr("torchtune.distributed.gradients.BUCKET_BYTES", bucket_bytes)
        return _summed(mesh.tokens, dtype)


def _summed(axis, dtype):
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    parameters[4].requires_grad_(False)
    for index, parameter in enumerate(parameters):
        if index != 4 and (index, axis.rank) != (2, 1):
            parameter.grad = gradient(index, axis.rank).to(dtype)
    parameters[1].grad = parameters[1].grad.T.contiguous().T
    before = [parameter.grad for parameter in parameters]
    sum_gradients(parameters, axis)
    assert all(old is None or p.grad is old for p, old in zip(parameters, before, strict=True))  # in place
    return [None if p.grad is None else p.grad.tolist() for p in parameters]


def test_gradients_are_the_sum_of_all_ranks(four_ranks):
    """Whatever shares a bucket; a bf16 gradient is summed in float32 and rounded once, as FSDP's are."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for bucket_bytes in (1, 100, 2000, 2**26):
            found = four_ranks.run(summed, bucket_bytes, dtype)
            assert found[1:] == found[:1] * 3
            for index, got in enumerate(found[0]):
                if index == 4:
                    assert got is None
                    continue
                ranks = [rank for rank in range(4) if (index, rank) != (2, 1)]
                exact = torch.stack([gradient(index, rank).to(dtype).double() for rank in ranks]).sum(0)
                if dtype == torch.bfloat16:
                    exact = exact.float().bfloat16()
                tolerance = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 0.0}[dtype]
                torch.testing.assert_close(
                    torch.tensor(got, dtype=torch.float64), exact.double(), rtol=0, atol=tolerance
                )
