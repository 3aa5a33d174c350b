"""What a training step sends, against the formulae of each scheme: nothing is gathered twice or wider than said.

Letters: L layers, D hidden_size, T tokens of a rank's micro-batch, R ranks; fp32, so 4 bytes an element.
On the CPU FSDP's gather is a broadcast from each rank, its scatter an exchange (parallel/host_transfers.py).
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.communication import Counting
from torchtune.data.batch import collate
from torchtune.data.sample import Sample
from torchtune.distributed.mesh import MeshSizes, open_mesh
from torchtune.models.build import build_model
from torchtune.modules.losses import LinearCrossEntropy
from torchtune.parallel.context_parallel import shard_context
from torchtune.parallel.expert_parallel import apply_expert_parallel
from torchtune.parallel.fsdp import apply_fsdp, defer_sums
from torchtune.parallel.gradients import GradientSums
from torchtune.parallel.tensor_parallel import apply_tensor_parallel
from torchtune.training.activation_checkpointing import apply_activation_checkpointing
from torchtune.training.precision import autocast
from torchtune.training.stepped import SteppedParameters

L, D, T = 3, 16, 24
SIZES = {
    "vocab_size": 48,
    "hidden_size": D,
    "intermediate_size": 32,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
LLAMA = {"model_type": "llama", "tie_word_embeddings": False, **SIZES}
TIED = LLAMA | {"tie_word_embeddings": True}
MIXTRAL = {"model_type": "mixtral", **SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
NOTHING = (0, 0)


def numbers(config):
    """Elements of all parameters, of matrices and of the rest (vectors and routers, which FSDP leaves whole)."""
    with torch.device("meta"):
        named = dict(build_model(config).named_parameters())
    matrices = sum(p.numel() for name, p in named.items() if p.dim() > 1 and not name.endswith(".gate.weight"))
    total = sum(p.numel() for p in named.values())
    return total, matrices, total - matrices


def batch_of(data_rank):
    """One document of T tokens, all but the first trained."""
    ids = np.random.default_rng(data_rank).integers(0, 48, T).astype(np.int32)
    return collate([[Sample(ids, np.arange(T) > 0)]])


def step(config, sizes, *, dtype=torch.float32, num_micro_batches=1, checkpointed=False, sums_once=False, **fsdp):
    """What this rank sends in the forward passes, the backward passes and the sum of gradients of one step."""
    with open_mesh(sizes, torch.device("cpu")) as mesh:
        torch.manual_seed(0)
        model = build_model(config)
        apply_tensor_parallel(model, mesh.tensor)
        apply_expert_parallel(model, mesh.expert)
        if checkpointed:
            apply_activation_checkpointing(model.model.layers)
        apply_fsdp(model, mesh, dtype=dtype, **fsdp)
        stepped, sums = SteppedParameters(model), GradientSums(model, mesh)
        batch = shard_context(batch_of(mesh.data.rank), mesh.context)
        phases = {}
        with Counting() as counting:
            for index in range(num_micro_batches):
                defer_sums(model, sums_once and index + 1 < num_micro_batches)
                with autocast(model, dtype):
                    loss = model(
                        batch.input_ids,
                        batch.documents,
                        labels=batch.labels,
                        trained=batch.trained,
                        loss=LinearCrossEntropy(T),
                    )
                add(phases, "forward", counting.sent)
                loss.backward()
                add(phases, "backward", counting.sent)
            stepped.take_gradients()
            sums.sum(stepped.by_name)
            add(phases, "sum", counting.sent)
            sums.norm(stepped.by_name, torch.device("cpu"))
            one_number = (1, 8) if dist.is_initialized() else NOTHING  # in float64
            assert counting.sent.of("all_reduce") == one_number
        return phases


def add(phases, name, sent):
    kinds = {kind: sent.of(kind) for kind in sent.num}
    before = phases.setdefault(name, {})
    for kind, (num, num_bytes) in kinds.items():
        old = before.get(kind, NOTHING)
        before[kind] = (old[0] + num, old[1] + num_bytes)


def same_on_all(found):
    assert all(other == found[0] for other in found[1:])
    return found[0]


def test_one_rank_sends_nothing():
    assert step(MIXTRAL, MeshSizes()) == {"forward": {}, "backward": {}, "sum": {}}


@pytest.mark.parametrize("config", [LLAMA, TIED])
def test_replicas_sum_their_gradients_once(two_ranks, config):
    """However many micro-batches: 4 bytes a parameter, in one bucket."""
    total, _, _ = numbers(config)
    for num_micro_batches in (1, 3):
        sent = same_on_all(
            two_ranks.run(step_of, config, MeshSizes(replicate=2), {"num_micro_batches": num_micro_batches})
        )
        assert sent == {"forward": {}, "backward": {}, "sum": {"all_reduce": (1, 4 * total)}}


def step_of(config, sizes, options):
    return step(config, sizes, **options)


def buckets():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("torchtune.distributed.gradients.BUCKET_BYTES", 4 * 1500)
        return step(TIED, MeshSizes(replicate=2))


def test_buckets_are_filled(two_ranks):
    """Not one collective a parameter: any two buckets in a row are more than 1,500 elements here."""
    total, _, _ = numbers(TIED)
    num, num_bytes = same_on_all(two_ranks.run(buckets))["sum"]["all_reduce"]
    assert num_bytes == 4 * total
    assert total // 1500 < num <= 2 * total // 1500 + 1


@pytest.mark.parametrize("config", [LLAMA, TIED])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_fsdp_gathers_each_matrix_for_a_pass_and_scatters_its_gradient(two_ranks, config, checkpointed):
    """A gather a layer, embedding and head in each pass; what the model itself uses last stays for the backward pass."""
    _, matrices, others = numbers(config)
    embedding = 4 * 48 * D
    tied = config is TIED
    groups = L + 1 if tied else L + 2
    sent = same_on_all(two_ranks.run(step_of, config, MeshSizes(), {"checkpointed": checkpointed}))
    assert sent["forward"] == {"broadcast": (2 * groups, 4 * matrices)}
    # The root's, which is the head (tied: the embedding too), is still there.
    assert sent["backward"]["broadcast"] == (2 * (groups - 1), 4 * matrices - embedding)
    assert sent["backward"]["all_to_all"] == (groups, 4 * matrices)
    assert sent["sum"] == {"all_reduce": (1, 4 * others)}


def test_fsdp_without_resharding_gathers_once(two_ranks):
    _, matrices, _ = numbers(TIED)
    sent = same_on_all(two_ranks.run(step_of, TIED, MeshSizes(), {"reshard_after_forward": False}))
    assert sent["forward"] == {"broadcast": (2 * (L + 1), 4 * matrices)}
    assert sent["backward"] == {"all_to_all": (L + 1, 4 * matrices)}


def test_fsdp_gathers_in_the_computed_type_and_sums_in_float32(two_ranks):
    _, matrices, others = numbers(TIED)
    sent = same_on_all(two_ranks.run(step_of, TIED, MeshSizes(), {"dtype": torch.bfloat16}))
    assert sent["forward"] == {"broadcast": (2 * (L + 1), 2 * matrices)}
    assert sent["backward"]["all_to_all"] == (L + 1, 4 * matrices)
    assert sent["sum"] == {"all_reduce": (1, 4 * others)}


@pytest.mark.parametrize(("sums_once", "sums"), [(False, 3), (True, 1)])
def test_fsdp_scatters_each_micro_batch_or_once(two_ranks, sums_once, sums):
    _, matrices, others = numbers(TIED)
    options = {"num_micro_batches": 3, "sums_once": sums_once}
    sent = same_on_all(two_ranks.run(step_of, TIED, MeshSizes(), options))
    assert sent["backward"]["all_to_all"] == (sums * (L + 1), sums * 4 * matrices)
    assert sent["sum"] == {"all_reduce": (1, 4 * others)}


def test_fsdp_of_replicas_adds_a_sum_of_shares(four_ranks):
    _, matrices, others = numbers(TIED)
    sent = same_on_all(four_ranks.run(step_of, TIED, MeshSizes(replicate=2), {}))
    assert sent["forward"] == {"broadcast": (2 * (L + 1), 4 * matrices)}
    assert sent["backward"]["broadcast"][0] == 2 * L
    assert sent["backward"]["all_to_all"] == (L + 1, 4 * matrices)
    assert sent["backward"]["all_reduce"] == (L + 1, 4 * matrices // 2)
    assert sent["sum"] == {"all_reduce": (1, 4 * others)}


def test_tensor_ranks_gather_and_scatter_around_each_block(two_ranks):
    """Two blocks a layer, the embedding and the decoder's end; the loss gathers three numbers a token and rank."""
    tokens, loss = 4 * T * D, 4 * 2 * (T - 1) * 3
    _, _, vectors = numbers(LLAMA)
    sent = same_on_all(two_ranks.run(step_of, LLAMA, MeshSizes(tensor=2), {}))
    assert sent["forward"] == {
        "all_gather": (2 * L + 2, (2 * L + 1) * tokens + loss),
        "reduce_scatter": (2 * L + 1, (2 * L + 1) * tokens),
    }
    assert sent["backward"] == {
        "all_gather": (2 * L + 1, (2 * L + 1) * tokens),
        "reduce_scatter": (2 * L + 1, (2 * L + 1) * tokens),
    }
    assert sent["sum"] == {"all_reduce": (1, 4 * vectors)}


def test_tensor_ranks_within_fsdp_send_half_of_each(four_ranks):
    """FSDP shards what tensor parallelism has left: half of each matrix."""
    _, matrices, vectors = numbers(LLAMA)
    tokens = 4 * T * D
    sent = same_on_all(four_ranks.run(step_of, LLAMA, MeshSizes(tensor=2), {}))
    assert sent["forward"]["broadcast"] == (2 * (L + 2), 4 * matrices // 2)
    assert sent["forward"]["all_gather"] == (2 * L + 2, (2 * L + 1) * tokens + 4 * 2 * (T - 1) * 3)
    assert sent["backward"]["all_to_all"] == (L + 2, 4 * matrices // 2)
    assert sent["backward"]["reduce_scatter"] == (2 * L + 1, (2 * L + 1) * tokens)
    assert sent["sum"] == {"all_reduce": (2, 2 * 4 * vectors)}  # over the tokens axis, over the tensor axis


def test_experts_exchange_tokens_twice_a_layer_and_pass(two_ranks):
    """And once their counts; rows go as they are routed, so their number is at least the rank's own and at most all."""
    own, counts = 4 * T * 2 * D, 8 * 4
    _, matrices, _ = numbers(MIXTRAL)
    experts = L * 4 * 3 * D * 32
    for sent in two_ranks.run(step_of, MIXTRAL, MeshSizes(expert=2), {}):
        # The experts are nobody else's, so nothing of theirs is gathered or summed.
        assert sent["forward"]["broadcast"][1] == 4 * (matrices - experts)
        scatters, scattered = L + 2, 4 * (matrices - experts)
        for phase, exchanges, besides in (("forward", 3 * L, L * counts), ("backward", 2 * L, scattered)):
            num, num_bytes = sent[phase]["all_to_all"]
            assert num == exchanges + (scatters if phase == "backward" else 0)
            assert 2 * L * own <= num_bytes - besides <= 2 * 2 * L * own


def test_context_ranks_gather_keys_and_values_once_a_layer(two_ranks):
    """Both in one collective, and their gradients in one; each rank has the gradients of its own tokens."""
    total, _, _ = numbers(LLAMA)
    keys_and_values = 4 * T * 2 * 2 * (D // 4)  # T tokens, K and V, 2 heads of D / 4
    sent = same_on_all(two_ranks.run(step_of, LLAMA, MeshSizes(context=2), {}))
    assert sent["forward"] == {"all_gather": (L, L * keys_and_values)}
    assert sent["backward"] == {"reduce_scatter": (L, L * keys_and_values)}
    assert sent["sum"] == {"all_reduce": (1, 4 * total)}
