"""Parts of tensors: what is held, put together again, is the whole."""

import itertools

import pytest
import torch

from torchtune.distributed.part import Part


@pytest.mark.parametrize("shape", [(8,), (6, 4), (5, 3), (4, 6, 2)])
@pytest.mark.parametrize("num", [1, 2, 3])
def test_shares_of_a_dim_make_up_the_whole(shape, num):
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for dim in range(len(shape)):
        rebuilt = torch.full(shape, -1)
        shares = [Part.all_of(shape).take(dim, index, num) for index in range(num)]
        for share in shares:
            assert share.of(whole).shape == share.shape
            share.put(share.of(whole), rebuilt)
        assert torch.equal(torch.cat([share.of(whole) for share in shares], dim), whole)
        assert torch.equal(rebuilt, whole)


def test_stretches_are_shared_each_for_itself():
    """Gate and up in one matrix: each rank has its half of both, as two separate matrices would give."""
    gate, up = torch.randn(6, 3), torch.randn(6, 3)
    whole = torch.cat((gate, up))
    for index in range(2):
        share = Part.all_of(whole.shape).take(0, index, 2, stretches=(6, 6))
        mine = slice(3 * index, 3 * index + 3)
        assert torch.equal(share.of(whole), torch.cat((gate[mine], up[mine])))


def test_splits_one_after_the_other():
    """Tensor parallel columns, then FSDP's rows of what is left, also where a stretch is cut."""
    whole = torch.arange(12 * 4).view(12, 4)
    rebuilt = torch.full((12, 4), -1)
    for tensor_rank, fsdp_rank in itertools.product(range(2), range(3)):
        share = Part.all_of(whole.shape).take(0, tensor_rank, 2, stretches=(6, 6)).take(0, fsdp_rank, 3)
        held = Part.all_of(whole.shape).take(0, tensor_rank, 2, stretches=(6, 6)).of(whole)
        assert torch.equal(share.of(whole), held[2 * fsdp_rank : 2 * fsdp_rank + 2])
        share.put(share.of(whole), rebuilt)
    assert torch.equal(rebuilt, whole)


def test_a_rank_may_hold_nothing():
    """Five rows on four ranks: two, two, one and none, as FSDP has it."""
    shares = [Part.all_of((5, 2)).take(0, index, 4) for index in range(4)]
    assert [share.shape for share in shares] == [(2, 2), (2, 2), (1, 2), (0, 2)]
    assert [share.is_whole for share in [*shares, Part.all_of((5, 2))]] == [False] * 4 + [True]
    assert shares[3].of(torch.zeros(5, 2)).shape == (0, 2)
