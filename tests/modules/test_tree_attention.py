"""Attention over documents that begin alike, against each whole text alone."""

import pytest
import torch

from torchtune.evaluation.prefix_tree import prefix_tree
from torchtune.modules.attend import Scores, attend
from torchtune.modules.documents import Documents
from torchtune.modules.tree_attention import attend_tree

SHOTS = list(range(30))
TEXTS = [
    [*SHOTS, 1, *range(50, 60), 3],
    [*SHOTS, 1, *range(50, 60), 4, 5],
    [*SHOTS, 1, *range(50, 60), 4, 6, 7],
    [*SHOTS, 2, *range(60, 70), 3],
    SHOTS[:20] + [9] * 40,
    list(range(70, 73)),
    [*range(71, 90), *SHOTS, *SHOTS, *SHOTS],
]


def alone(q, k, v):
    """softmax(q k^T / sqrt(H)) v for one text, by plain products in float64."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    products = torch.einsum("nqh,mqh->qnm", q, k) / q.shape[-1] ** 0.5
    products = products.masked_fill(torch.ones(len(q), len(q), dtype=torch.bool).triu(1), float("-inf"))
    return torch.einsum("qnm,mqh->nqh", products.softmax(-1), v)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_a_text_is_what_it_is_alone(num_kv_heads, dtype, tolerance):
    """Beginnings of beginnings, groups of like length, a text that shares nothing."""
    torch.manual_seed(0)
    tree = prefix_tree(TEXTS)
    assert len(tree.input_ids) < sum(map(len, TEXTS)) - 100, "something is shared"
    q, k, v = (torch.randn(len(tree.input_ids), heads, 16).to(dtype) for heads in (4, num_kv_heads, num_kv_heads))
    made = attend_tree(q, k, v, tree.documents, 0.25)
    for places in tree.places:
        expected = alone(*(x[places].double() for x in (q, k, v)))
        torch.testing.assert_close(made[places].double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "scores", [Scores(0.25), Scores(0.25, window=1000), Scores(0.25, window=8), Scores(0.25, chunk=8)]
)
def test_packed_documents_are_the_same_with_gradients_and_without(scores):
    """Windows that hide nothing take the same way as none; the others another."""
    torch.manual_seed(0)
    documents = Documents.from_lengths([40, 1, 3, 50, 41])
    q, k, v = (torch.randn(135, heads, 16, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    with torch.no_grad():
        found = attend(q, k, v, documents, scores)
    torch.testing.assert_close(found, attend(q, k, v, documents, scores).detach())
