"""Routers, experts and the load-balancing loss, each against a plain loop or transformers."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from torchtune.data.batch import collate
from torchtune.data.sample import Sample
from torchtune.models.build import build_model
from torchtune.modules.moe import (
    Experts,
    MoE,
    Router,
    choose_by_biased_groups,
    choose_by_groups,
    choose_then_softmax,
    gated_by,
    load_balancing_loss,
    softmax_then_choose,
)
from torchtune.modules.stored import as_in_model, as_stored, fit_layouts, stored_tensors
from torchtune.training.activation_checkpointing import apply_activation_checkpointing

E, D, F, T, K = 5, 6, 4, 11, 2
MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "output_router_logits": True,
    "router_aux_loss_coef": 5.0,
}


def random_experts(**options):
    torch.manual_seed(0)
    experts = Experts(E, D, F, **{"gated": gated_by("silu"), **options}).double()
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    return experts


def one_by_one(experts, x, weights, chosen):
    """Each token through each of its experts, one at a time."""
    out = []
    for token, row_weights, row in zip(x, weights, chosen, strict=True):
        total = torch.zeros(D, dtype=x.dtype)
        for weight, e in zip(row_weights, row.tolist(), strict=True):
            up, down = experts.gate_up_proj[e], experts.down_proj[e]
            up, down = (up.T, down.T) if experts.transposed else (up, down)
            hidden = up @ (token * weight if experts.weigh_inputs else token)
            if experts.gate_up_proj_bias is not None:
                hidden = hidden + experts.gate_up_proj_bias[e]
            hidden = down @ (torch.nn.functional.silu(hidden[:F]) * hidden[F:])
            if experts.down_proj_bias is not None:
                hidden = hidden + experts.down_proj_bias[e]
            total = total + (hidden if experts.weigh_inputs else hidden * weight)
        out.append(total)
    return torch.stack(out)


@pytest.mark.parametrize("options", [{}, {"bias": True, "transposed": True}, {"weigh_inputs": True}])
def test_experts_equal_one_token_at_a_time(options):
    """Values and all gradients, the weights' included; expert 3 has no token."""
    experts = random_experts(**options)
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(T, K, dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([0, 1, 2, 4])[torch.stack([torch.randperm(4)[:K] for _ in range(T)])]
    inputs = [x, weights, *experts.parameters()]
    out, expected = experts(x, weights, chosen), one_by_one(experts, x, weights, chosen)
    grad = torch.randn(T, D, dtype=torch.float64)
    torch.testing.assert_close(out, expected)
    found, wanted = torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_compute_in_the_type_of_their_input(dtype):
    """float32 weights, half-precision tokens: the output and its gradient have the tokens' type."""
    experts = random_experts().float()
    x = torch.randn(T, D, dtype=dtype, requires_grad=True)
    weights, chosen = torch.rand(T, K), torch.randint(0, E, (T, K))
    out = experts(x, weights, chosen)
    out.sum().backward()
    assert (out.dtype, x.grad.dtype, experts.down_proj.grad.dtype) == (dtype, dtype, torch.float32)
    expected = one_by_one(experts.double(), x.double(), weights.double(), chosen)
    torch.testing.assert_close(out.double(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


def test_routers_choose_the_largest():
    """Over all experts or over the chosen alone; normalised weights sum to one; the choice is the same."""
    logits = torch.randn(T, E)
    plain, chosen = softmax_then_choose(logits, top_k=K, normalised=False)
    normalised, _ = softmax_then_choose(logits, top_k=K, normalised=True)
    alone, chosen_alone = choose_then_softmax(logits, top_k=K)
    assert chosen.equal(logits.sort(descending=True).indices[:, :K])
    assert chosen_alone.equal(chosen)
    torch.testing.assert_close(plain, logits.softmax(-1).gather(1, chosen))
    # e^a / (e^a + e^b) is the same share whichever sum it was taken of first.
    torch.testing.assert_close(normalised, alone)


@pytest.mark.parametrize("normalised", [True, False])
def test_biased_groups_equal_deepseek_v3(normalised):
    """The choice with the correction, the weights without it, their gradient."""
    sizes = {"hidden_size": D, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}
    theirs = DeepseekV3TopkRouter(DeepseekV3Config(**sizes, norm_topk_prob=normalised, routed_scaling_factor=1.5))
    choose = partial(choose_by_biased_groups, top_k=3, num_groups=4, top_groups=2, normalised=normalised, scale=1.5)
    ours = Router(D, 8, choose, has_correction=True)
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.e_score_correction_bias)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, D)
    _, expected, chosen = theirs(x)
    weights, experts, _ = ours(x)
    assert experts.sort().values.equal(chosen.sort().values)
    by_expert = torch.zeros(T, 8).scatter(1, experts, weights)
    torch.testing.assert_close(by_expert, torch.zeros(T, 8).scatter(1, chosen, expected))
    grad = torch.randn(T, 8)
    (found,) = torch.autograd.grad(by_expert, ours.weight, grad)
    (wanted,) = torch.autograd.grad(torch.zeros(T, 8).scatter(1, chosen, expected), theirs.weight, grad)
    torch.testing.assert_close(found, wanted)


def test_groups_are_chosen_by_their_best():
    """By hand: the third largest expert is passed over with its group, for one of a better group."""
    logits = torch.tensor([[4.0, 0.0, 3.0, -9.0, 3.5, 1.0]]).log_softmax(-1)  # groups of two
    weights, experts = choose_by_groups(logits, top_k=2, num_groups=3, top_groups=2, scale=2.0)
    assert experts.tolist() == [[0, 4]]
    torch.testing.assert_close(weights, 2 * logits.exp()[:, [0, 4]])
    weights, experts = choose_by_groups(logits, top_k=3, num_groups=3, top_groups=2, scale=1.0)
    assert experts.tolist() == [[0, 4, 5]]


def test_router_scores_in_float32():
    """Half-precision tokens are scored in float32: near experts stay apart."""
    router = Router(D, E, partial(softmax_then_choose, top_k=K, normalised=True))
    x = torch.randn(T, D, dtype=torch.bfloat16)
    _, _, logits = router(x)
    assert logits.equal(x.float() @ router.weight.T)


def test_load_balancing_loss_equals_transformers():
    """Of several layers, with its gradient."""
    logits = [torch.randn(T, E, requires_grad=True) for _ in range(3)]
    ours, theirs = load_balancing_loss(logits, top_k=K), load_balancing_loss_func(tuple(logits), E, K)
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits), strict=True):
        torch.testing.assert_close(one, other)


def test_load_balancing_loss_is_k_when_all_are_used_alike():
    """The smallest value of the formula, whatever the number of experts."""
    logits = 10 * torch.eye(E).repeat(3, 1)
    assert load_balancing_loss([logits], top_k=1).item() == pytest.approx(1.0)


def test_experts_lie_apart_or_stacked_in_a_checkpoint():
    """Both layouts are found by the names, and what one writes it reads again."""
    model = MoE(Router(D, E, partial(choose_then_softmax, top_k=K)), random_experts(separate=("w1", "w3", "w2")))
    tensors = stored_tensors(model)
    apart = dict(as_stored(model, tensors))
    assert apart["experts.3.w3.weight"].equal(model.experts.gate_up_proj[3, F:])
    assert apart["experts.0.w2.weight"].equal(model.experts.down_proj[0])
    fit_layouts(model, {"gate.weight", "experts.gate_up_proj", "experts.down_proj"})
    assert dict(as_stored(model, tensors)).keys() == tensors.keys()
    fit_layouts(model, apart)
    again = as_in_model(model, apart)
    assert all(again[name].equal(tensor) for name, tensor in tensors.items())


def test_nothing_of_the_routers_is_kept_after_a_step():
    """Not by a layer that is computed again in the backward pass, nor by a forward without labels."""
    model = build_model(MIXTRAL)
    mixtures = [module for module in model.modules() if isinstance(module, MoE)]
    ids = torch.arange(10)[None]
    model(ids)
    assert all(moe.router_logits is None for moe in mixtures)
    plain = model(ids, labels=ids)
    plain.backward()
    expected = mixtures[0].gate.weight.grad.clone()
    model.zero_grad()
    apply_activation_checkpointing(model.model.layers)
    model(ids, labels=ids).backward()
    torch.testing.assert_close(mixtures[0].gate.weight.grad, expected)
    assert all(moe.router_logits is None for moe in mixtures)


def test_dummies_do_not_count_in_the_routers_loss():
    """The same loss and gradients as without them: they are tokens of no document."""
    model = build_model(MIXTRAL).double()
    rng = np.random.default_rng(0)
    made = [Sample(rng.integers(0, 11, n, np.int32), np.arange(n) > 0, "made.jsonl:1", 0) for n in (6, 9)]
    batch = collate([made])

    def gradients(batch):
        model.zero_grad()
        loss = model(batch.input_ids, batch.documents, labels=batch.labels, trained=batch.trained)
        loss.backward()
        return [loss, *(parameter.grad for parameter in model.parameters())]

    assert len(batch.padded_to(32).input_ids) == 32
    for one, other in zip(gradients(batch.padded_to(32)), gradients(batch), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_batch_of_dummies_has_no_routers_loss():
    """And still a gradient, of zeros, for each parameter."""
    model = build_model(MIXTRAL)
    batch = collate([])
    loss = model(batch.input_ids, batch.documents, labels=batch.labels, trained=batch.trained)
    loss.backward()
    assert loss.item() == 0
    assert not any(parameter.grad.any() for parameter in model.parameters())
