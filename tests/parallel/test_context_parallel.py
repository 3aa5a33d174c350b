"""Tokens shared by the ranks of an axis: the loss and all gradients are those of the batch on one device."""

import random

import numpy as np
import pytest
import torch

from tests.models.families import FAMILIES
from tests.parallel.same_model import assert_same, fill, on_meta, tensors_of, whole_axis
from torchtune.data.batch import collate
from torchtune.data.sample import Sample
from torchtune.distributed.mesh import MeshSizes, open_mesh
from torchtune.distributed.part import parts
from torchtune.models.build import build_model
from torchtune.modules.attend import hide_from_compiler
from torchtune.parallel.context_parallel import deal_tokens, shard_context
from torchtune.parallel.expert_parallel import apply_expert_parallel
from torchtune.parallel.tensor_parallel import apply_tensor_parallel
from torchtune.training.activation_checkpointing import apply_activation_checkpointing

# Packs of many and of few, fewer tokens than pieces, less than a token a rank, lengths that nothing divides.
PACKS = ([33], [9, 1, 14], [17, 3, 25, 2, 8, 40, 1], [1, 1, 2, 1], [5, 5, 5, 5], [2])


def made_batch(lengths, *, share_trained=0.6, only_first=False):
    """Documents of random tokens, some of them trained; or in the first document alone."""
    rng = np.random.default_rng(sum(lengths))
    samples = []
    for index, length in enumerate(lengths):
        trained = rng.random(length) < share_trained
        trained[0] = False
        if only_first and index:
            trained[:] = False
        samples.append(Sample(rng.integers(0, 97, length).astype(np.int32), trained, f"made.jsonl:{index + 1}", index))
    return collate([samples])


def random_model(config):
    """Random everywhere: fresh norms and sinks would hide an error."""
    model = build_model(config).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            mean = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_(mean + 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(batch.input_ids, batch.documents, labels=batch.labels, trained=batch.trained)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def difference_of(model, batch, axis, *, multiple=1, whole=None):
    """The largest difference, as a share of the tensor's largest value, of loss and gradients summed over ranks."""
    expected = loss_and_gradients(whole or model, batch)
    here = shard_context(batch, axis, multiple=multiple)
    assert len(here.input_ids) % multiple == 0
    found = [axis.sum(tensor) for tensor in loss_and_gradients(model, here)]
    scales = [tensor.abs().max().clamp(min=1e-3) for tensor in expected]
    return max(
        ((one - other).abs().max() / scale).item() for one, other, scale in zip(found, expected, scales, strict=True)
    )


def _differences(config, num_ranks, packs, multiple):
    with open_mesh(MeshSizes(context=num_ranks), torch.device("cpu")) as mesh:
        model = random_model(config)
        return [difference_of(model, made_batch(lengths), mesh.context, multiple=multiple) for lengths in packs]


@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks_equal_one_device(two_ranks, name):
    """Families that differ in what attention sees, in float64; sums are only taken in another order."""
    for differences in two_ranks.run(_differences, FAMILIES[name], 2, PACKS, 1):
        assert max(differences) < 1e-10, dict(zip(map(str, PACKS), differences, strict=True))


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss with its router's loss", "llama4_text", "llama with longrope"])
def test_four_ranks_equal_one_device(four_ranks, name):
    """And with dummies, to make a rank's tokens a multiple of 3."""
    for differences in four_ranks.run(_differences, FAMILIES[name], 4, PACKS, 3):
        assert max(differences) < 1e-10, dict(zip(map(str, PACKS), differences, strict=True))


def _special_batches():
    differences = {}
    with open_mesh(MeshSizes(context=2), torch.device("cpu")) as mesh:
        for name in ("llama", "mixtral with its router's loss"):
            model = random_model(FAMILIES[name])
            one_rank = made_batch([3, 9, 9, 9, 9], only_first=True)
            num_trained = [float(shard_context(one_rank, mesh.context).num_trained == 0)]
            differences[f"{name}: only one rank trains"] = difference_of(model, one_rank, mesh.context)
            differences["how many ranks do not"] = 1 - mesh.context.sum(torch.tensor(num_trained)).item()
            differences[f"{name}: no token at all"] = difference_of(model, collate([]), mesh.context, multiple=2)
            padded = made_batch([7, 5]).padded_to(16)
            differences[f"{name}: padded before"] = difference_of(model, padded, mesh.context)
            apply_activation_checkpointing(model.model.layers)
            differences[f"{name}: recomputed"] = difference_of(model, made_batch([20, 13, 2]), mesh.context)
    return differences


def test_ranks_without_work_and_recomputation(two_ranks):
    for differences in two_ranks.run(_special_batches):
        assert max(differences.values()) < 1e-10, differences


def _errors_in(dtype):
    """Of each tensor against float64 from the same weights, as a share: alone, and split."""
    with open_mesh(MeshSizes(context=2), torch.device("cpu")) as mesh:
        batch = made_batch([200, 40, 30, 20, 35, 1, 28, 150])
        exact = random_model(FAMILIES["llama"])
        with torch.no_grad():
            for parameter in exact.parameters():
                parameter.copy_(parameter.to(dtype))
        model = random_model(FAMILIES["llama"])
        model.load_state_dict(exact.state_dict())
        model.to(dtype)
        expected = loss_and_gradients(exact, batch)
        alone = [tensor.double() for tensor in loss_and_gradients(model, batch)]
        found = loss_and_gradients(model, shard_context(batch, mesh.context))
        found = [mesh.context.sum(tensor.double()) for tensor in found]
        return [
            [(one - other).norm().item() / other.norm().item() for one, other in zip(ours, expected, strict=True)]
            for ours in (alone, found)
        ]


def test_short_documents_in_bfloat16(two_ranks):
    """They go through products in groups, here too: no less exact than on one device."""
    for alone, found in two_ranks.run(_errors_in, torch.bfloat16):
        assert all(one < 1.5 * other + 1e-3 for one, other in zip(found, alone, strict=True)), (found, alone)


def _compiled():
    with open_mesh(MeshSizes(context=2), torch.device("cpu")) as mesh:
        config = {**FAMILIES["gemma2"], "num_hidden_layers": 1}  # compiled once and not twice
        model, whole = random_model(config), random_model(config)
        hide_from_compiler()
        for layer in model.model.layers:
            layer.forward = torch.compile(layer.forward, dynamic=True, backend="aot_eager")
        differences = [difference_of(model, made_batch([20, 13, 2]), mesh.context, whole=whole)]
        with torch.compiler.set_stance("fail_on_recompile"):
            return [*differences, difference_of(model, made_batch([9, 1, 14, 30]), mesh.context, whole=whole)]


def test_compiled_layers(two_ranks):
    """Traced once, whatever lengths come."""
    for differences in two_ranks.run(_compiled):
        assert max(differences) < 1e-10


def _split_further(name, sizes):
    """Compare where layers or experts are shared by ranks too."""
    with open_mesh(sizes, torch.device("cpu")) as mesh:
        whole, split = random_model(FAMILIES[name]), on_meta(FAMILIES[name])
        apply_tensor_parallel(split, mesh.tensor)
        apply_expert_parallel(split, mesh.expert)
        fill(split, tensors_of(whole))
        for lengths in PACKS:
            batch = made_batch(lengths)
            expected = loss_and_gradients(whole, batch)
            loss, *gradients = loss_and_gradients(split, shard_context(batch, mesh.context, multiple=mesh.tensor.size))
            assert_same(mesh.context.sum(loss), expected[0], "loss")
            held = parts(split)
            for (of, _), gradient, other in zip(split.named_parameters(), gradients, expected[1:], strict=True):
                found = torch.zeros_like(other)
                held[of].put(gradient, found)  # what is not split is a summand on each rank
                assert_same(whole_axis().sum(found), other, f"gradient of {of}")


@pytest.mark.parametrize("name", ["gemma2", "deepseek_v3", "gpt_oss with its router's loss"])
def test_with_tensor_parallelism(four_ranks, name):
    """Two ranks share the tokens, two each layer; and the tokens that a rank holds are a multiple of two."""
    four_ranks.run(_split_further, name, MeshSizes(context=2, tensor=2))


@pytest.mark.parametrize("name", ["mixtral with its router's loss", "llama4_text"])
def test_with_expert_parallelism(two_ranks, name):
    """The ranks that share the tokens share the experts."""
    two_ranks.run(_split_further, name, MeshSizes(context=2, expert=2))


def _what_ranks_hold(lengths, multiple):
    with open_mesh(MeshSizes(context=4), torch.device("cpu")) as mesh:
        batch = made_batch(lengths)
        here = shard_context(batch, mesh.context, multiple=multiple)
        documents = here.documents
        return {
            "tokens": list(
                zip(here.input_ids.tolist(), here.labels.tolist(), documents.positions.tolist(), strict=True)
            ),
            "num_real": documents.num_real,
            "trained": here.trained.tolist(),
            "counts": (here.num_trained, here.num_tokens),
            "documents": sum(documents.lengths) == len(here.input_ids) == documents.cu_seqlens[-1].item(),
        }


def test_every_token_is_held_once(four_ranks):
    """With its label and its position; ranks hold alike many, a multiple of 3, and count their own."""
    for lengths in PACKS:
        whole = made_batch(lengths)
        held = four_ranks.run(_what_ranks_hold, lengths, 3)
        assert len({len(rank["tokens"]) for rank in held}) == 1
        assert len(held[0]["tokens"]) % 3 == 0
        assert len(held[0]["tokens"]) * 4 - sum(lengths) < 4 * 3
        real = [token for rank in held for token in rank["tokens"][: rank["num_real"]]]
        positions = [position for length in lengths for position in range(length)]
        assert sorted(real) == sorted(zip(whole.input_ids.tolist(), whole.labels.tolist(), positions, strict=True))
        dummies = [token for rank in held for token in rank["tokens"][rank["num_real"] :]]
        assert all((token, label) == (0, -100) for token, label, _ in dummies)
        assert [sum(counts) for counts in zip(*(rank["counts"] for rank in held), strict=True)] == [
            whole.num_trained,
            whole.num_tokens,
        ]
        for rank in held:
            assert rank["documents"]
            assert rank["trained"] == [i for i, (_, label, _) in enumerate(rank["tokens"]) if label != -100]


def random_pack(rng, num_tokens, kind):
    lengths = []
    while (left := num_tokens - sum(lengths)) > 0:
        drawn = {
            "mixed": max(4, int(rng.lognormvariate(5.5, 1.2))),
            "short": rng.randint(20, 150),
            "long": rng.randint(num_tokens // 8, num_tokens),
            "one": num_tokens,
        }[kind]
        lengths.append(min(drawn, left))
    return lengths


def busiest(lengths, num_ranks, window):
    """The work of the rank with most, as a multiple of the mean: keys that its tokens see."""
    dealt = deal_tokens(lengths, num_ranks, -(-sum(lengths) // num_ranks))
    work = [
        sum(min(place + 1, window or place + 1) for _, start, end in spans for place in range(start, end))
        for spans in dealt
    ]
    return max(work) * num_ranks / sum(work)


@pytest.mark.parametrize(("kind", "num_tokens"), [("mixed", 4096), ("short", 2048), ("long", 4096), ("one", 4096)])
@pytest.mark.parametrize(("window", "most", "mean"), [(None, 1.12, 1.03), (128, 1.15, 1.06)])
def test_work_is_about_equal(kind, num_tokens, window, most, mean):
    """Over random packs, on 2, 4 and 8 ranks; cut as one axis, the mean is up to 1.7."""
    for num_ranks in (2, 4, 8):
        rng = random.Random(num_ranks)
        found = [busiest(random_pack(rng, num_tokens, kind), num_ranks, window) for _ in range(20)]
        assert max(found) < most
        assert sum(found) / len(found) < mean


def test_short_documents_stay_whole():
    """A piece costs as much as a document; at most one cut a rank fills it up."""
    lengths = [40] * 50
    pieces = [span for spans in deal_tokens(lengths, 4, 500) for span in spans]
    assert sum(end - start for _, start, end in pieces) == 2000
    assert len(pieces) <= 50 + 3


def test_one_rank_holds_the_batch_itself():
    batch = made_batch([5, 4])
    with open_mesh(MeshSizes(), torch.device("cpu")) as mesh:
        assert shard_context(batch, mesh.context) is batch
        padded = shard_context(batch, mesh.context, multiple=4)
    assert padded.documents.lengths == (5, 4, 3)


def _cached():
    with open_mesh(MeshSizes(context=2), torch.device("cpu")) as mesh:
        model = random_model(FAMILIES["llama"])
        here = shard_context(made_batch([5, 4]), mesh.context)
        try:
            model(here.input_ids, here.documents, cache=model.empty_cache(len(here.documents.lengths)))
        except ValueError as error:
            return str(error)


def test_a_cache_is_refused(two_ranks):
    for said in two_ranks.run(_cached):
        assert "whole documents" in said


def _too_long():
    with open_mesh(MeshSizes(context=2), torch.device("cpu")) as mesh:
        model = random_model(FAMILIES["gpt2"])
        here = shard_context(made_batch([5, 65]), mesh.context)
        try:
            model(here.input_ids, here.documents)
        except ValueError as error:
            return str(error)


def test_a_document_longer_than_the_learnt_positions_is_refused(two_ranks):
    """Though what a rank holds of it is shorter: all ranks say so, and none waits for another."""
    for said in two_ranks.run(_too_long):
        assert "document 1 has 65 tokens" in said
