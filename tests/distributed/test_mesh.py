"""The layout of ranks."""

import itertools

import pytest
import torch
import torch.distributed as dist

from torchtune.distributed.collectives import exchange, gather, gather_last, scatter_sum, sum_both_ways
from torchtune.distributed.mesh import MeshSizes, open_mesh
from torchtune.errors import ConfigError


@pytest.mark.parametrize(
    ("sizes", "num_ranks", "key"),
    [
        (MeshSizes(tensor=3), 4, "tensor_parallel"),
        (MeshSizes(replicate=2, shard=4), 4, "data_parallel_replicate"),
        (MeshSizes(shard=2), 1, "data_parallel_shard"),
        (MeshSizes(context=2, tensor=2, shard=2), 4, "data_parallel_shard"),
        (MeshSizes(expert=3), 4, "expert_parallel"),
        (MeshSizes(replicate=4, expert=2), 4, "expert_parallel"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(sizes, num_ranks, key):
    with pytest.raises(ConfigError) as error:
        sizes.fitted(num_ranks)
    assert [problem.key for problem in error.value.problems] == [key]


def test_shard_takes_what_is_left():
    assert MeshSizes(tensor=2).fitted(8) == MeshSizes(shard=4, tensor=2)
    assert MeshSizes(replicate=2, context=2).fitted(8) == MeshSizes(replicate=2, shard=2, context=2)
    assert MeshSizes(replicate=8).fitted(8) == MeshSizes(replicate=8, shard=1)


def _members(sizes):
    """The ranks on each axis of this rank, found by summing what each contributes."""
    found = {}
    with open_mesh(sizes, torch.device("cpu")) as mesh:
        for name in ("data", "tokens", "context", "tensor", "expert", "same_experts"):
            axis = getattr(mesh, name)
            marks = torch.zeros(dist.get_world_size())
            marks[dist.get_rank()] = 1 + axis.rank
            places = axis.sum(marks).tolist()
            found[name] = [rank for rank in sorted(range(len(places)), key=lambda i: places[i]) if places[rank]]
            assert len(found[name]) == axis.size
        for name in ("fsdp", "expert_fsdp"):
            device_mesh = getattr(mesh, name)
            found[name] = None if device_mesh is None else device_mesh.mesh.tolist()
    return found


def test_axes_are_as_documented(four_ranks):
    """Each axis holds the ranks that differ in its coordinate alone."""
    for replicate, shard, context, tensor in [(1, 1, 2, 2), (2, 2, 1, 1), (1, 2, 1, 2), (1, 2, 2, 1), (4, 1, 1, 1)]:
        place = list(itertools.product(range(replicate), range(shard), range(context), range(tensor)))
        for me, found in enumerate(four_ranks.run(_members, MeshSizes(replicate, shard, context, tensor))):
            r, s, c, t = place[me]
            alike = {
                "data": [k for k, (_, _, c2, t2) in enumerate(place) if (c2, t2) == (c, t)],
                "tokens": [k for k, (_, _, _, t2) in enumerate(place) if t2 == t],
                "context": [k for k, (r2, s2, _, t2) in enumerate(place) if (r2, s2, t2) == (r, s, t)],
                "tensor": [k for k, (r2, s2, c2, _) in enumerate(place) if (r2, s2, c2) == (r, s, c)],
            }
            assert {name: found[name] for name in alike} == alike
            shards = [k for k, (r2, _, _, t2) in enumerate(place) if (r2, t2) == (r, t)]
            if shard == 1:
                assert found["fsdp"] is None
            elif replicate == 1:
                assert found["fsdp"] == shards
            else:
                assert shards in found["fsdp"]


def test_the_expert_axis_lies_within_shard_and_context(four_ranks):
    found = four_ranks.run(_members, MeshSizes(shard=4, expert=2))
    assert [each["expert"] for each in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [each["same_experts"] for each in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [each["expert_fsdp"] for each in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]


def _collectives():
    with open_mesh(MeshSizes(tensor=2), torch.device("cpu")) as mesh:
        axis, me = mesh.tensor, dist.get_rank()
        torch.manual_seed(0)
        both = torch.randn(2, 4, 3, dtype=torch.float64)
        weights = torch.randn(2, 8, 3, dtype=torch.float64)

        x = both[me].clone().requires_grad_()
        whole = gather(x, axis)
        torch.testing.assert_close(whole, both.flatten(0, 1))
        (whole * weights[me]).sum().backward()
        torch.testing.assert_close(x.grad, weights.sum(0)[4 * me : 4 * me + 4])

        x = both[me].clone().requires_grad_()
        rows = scatter_sum(x, axis)
        torch.testing.assert_close(rows, both.sum(0)[2 * me : 2 * me + 2])
        (rows * weights[me, :2]).sum().backward()
        torch.testing.assert_close(x.grad, torch.cat((weights[0, :2], weights[1, :2])))

        x = both[me].clone().requires_grad_()
        total = sum_both_ways(x, axis)
        torch.testing.assert_close(total, both.sum(0))
        (total * weights[me, :4]).sum().backward()
        torch.testing.assert_close(x.grad, weights[:, :4].sum(0))

        sizes = [3, 2]
        torch.testing.assert_close(
            gather_last(both[me][:, : sizes[me]], axis, sizes), torch.cat((both[0], both[1, :, :2]), -1)
        )

        # Rank 0 sends 1 and 3 rows, rank 1 sends 2 and 2.
        send, receive = ([1, 3], [1, 2]) if me == 0 else ([2, 2], [3, 2])
        x = both[me].clone().requires_grad_()
        got = exchange(x, send, receive, axis)
        wanted = torch.cat((both[0, :1], both[1, :2])) if me == 0 else torch.cat((both[0, 1:], both[1, 2:]))
        torch.testing.assert_close(got, wanted)
        (got * got.detach()).sum().backward()
        torch.testing.assert_close(x.grad, both[me])


def test_collectives_and_their_gradients(two_ranks):
    two_ranks.run(_collectives)
