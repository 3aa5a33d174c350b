"""Parameter groups, freezing and stochastic rounding."""

import copy

import pytest
import torch
from torch import nn

from torchtune.errors import ConfigError
from torchtune.training.lr_schedulers import LRSchedule
from torchtune.training.optimizers import (
    ParamGroup,
    StochasticRounding,
    build_optimizer,
    build_param_groups,
    freeze,
)
from torchtune.training.precision import stochastic_round_


def model():
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def test_biases_and_norms_do_not_decay():
    """With weight decay on, parameters of one dimension form a group without it."""
    groups = build_param_groups(dict(model().named_parameters()), [], weight_decay=0.1)
    by_decay = {group.get("weight_decay"): {p.dim() for p in group["params"]} for group in groups}
    assert by_decay == {None: {2}, 0.0: {1}}


def test_a_pattern_gives_its_own_rate():
    """Parameters that match get the group's values, the others the optimizer's."""
    net = model()
    groups = build_param_groups(dict(net.named_parameters()), [ParamGroup(r"^0\.", {"lr": 0.5})], weight_decay=None)
    assert [(group.get("lr"), len(group["params"])) for group in groups] == [(0.5, 2), (None, 4)]


def test_what_the_user_gives_wins_over_what_the_method_asks_for():
    """Value by value; a rate of the user's is taken as it stands, without the method's ratio."""
    net = model()
    method = [ParamGroup("weight", {"lr_ratio": 16.0, "weight_decay": 0.1})]
    wished = [ParamGroup(r"^0\.", {"lr": 0.5}), ParamGroup(r"^2\.", {"weight_decay": 0.2})]
    groups = build_param_groups(dict(net.named_parameters()), wished, weight_decay=None, defaults=method)
    values = {id(p): {k: v for k, v in group.items() if k != "params"} for group in groups for p in group["params"]}
    assert values[id(net[0].weight)] == {"lr": 0.5, "weight_decay": 0.1}
    assert values[id(net[1].weight)] == {"lr_ratio": 16.0, "weight_decay": 0.1}
    assert values[id(net[2].weight)] == {"lr_ratio": 16.0, "weight_decay": 0.2}
    assert values[id(net[1].bias)] == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_ratio_multiplies_the_optimizers_own_rate(dtype):
    """Also where the rate is the optimizer's default, and in every step: plain SGD moves by rate x gradient."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).to(dtype)
    ratio = [ParamGroup(r"^1\.", {"lr_ratio": 16.0})]
    optimizer = build_optimizer(
        dict(net.named_parameters()), torch.optim.SGD, [], weight_decay=None, defaults=ratio
    )  # its rate is 1e-3
    schedule = LRSchedule(optimizer, name="constant", num_warmup_steps=2, min_lr_ratio=0.0)
    for step, expected in ((1, 0.5), (2, 1.0), (3, 1.0)):
        assert schedule.set_lr(step, step / 3) == pytest.approx(expected * 1e-3)
        for parameter in net.parameters():
            nn.init.zeros_(parameter)
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moved = [-parameter.item() / 1e-3 for parameter in net.parameters()]
        assert moved == pytest.approx([expected, 16 * expected], rel=2**-7)


def test_patterns_that_match_nothing_or_twice_are_refused():
    """A misspelt pattern must not train everything at another rate in silence."""
    with pytest.raises(ConfigError, match="matches no parameter"):
        build_param_groups(dict(model().named_parameters()), [ParamGroup("nothing", {"lr": 1.0})], weight_decay=None)
    with pytest.raises(ConfigError, match="matches both"):
        build_param_groups(
            dict(model().named_parameters()),
            [ParamGroup("0", {"lr": 1.0}), ParamGroup("weight", {"lr": 2.0})],
            weight_decay=None,
        )
    with pytest.raises(ConfigError, match="matches no parameter"):
        freeze(model(), ["embed"])
    with pytest.raises(ConfigError, match="nothing is left"):
        freeze(model(), ["."])


def test_stochastic_rounding_keeps_the_mean():
    """Rounded values lie on the two bf16 neighbours and average to the value (here a quarter of the way)."""
    torch.manual_seed(0)
    low, high = torch.tensor(1.0), torch.tensor(1.0 + 2**-7)
    source = torch.full((200_000,), 1.0 + 2**-9)
    target = torch.empty(200_000, dtype=torch.bfloat16)
    stochastic_round_(target, source)
    assert set(target.float().tolist()) == {low.item(), high.item()}
    # Standard error of the mean is 2^-7 * sqrt(3/16) / sqrt(200000) = 7.6e-6; five of them.
    assert target.double().mean().item() == pytest.approx(1.0 + 2**-9, abs=4e-5)


def test_updates_too_small_for_bf16_survive_on_average():
    """Rounding to nearest would leave the weights at 1.0 for ever."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = StochasticRounding([{"params": [weight]}], lambda groups: torch.optim.SGD(groups, lr=1e-4))
    for _ in range(50):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.double().mean().item() == pytest.approx(1.0 - 50e-4, abs=5e-4)


def test_stochastic_rounding_resumes_to_the_same_bits():
    """State saved and loaded into a new optimizer goes on exactly; moments are float32."""

    def build(parameters):
        return StochasticRounding([{"params": parameters}], lambda groups: torch.optim.AdamW(groups, lr=1e-2))

    def step(parameters, optimizer, k):
        torch.manual_seed(k)
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    one = [nn.Parameter(torch.ones(7, 3, dtype=torch.bfloat16)), nn.Parameter(torch.ones(5, dtype=torch.bfloat16))]
    first = build(one)
    for k in range(3):
        step(one, first, k)
    two = [nn.Parameter(parameter.detach().clone()) for parameter in one]
    second = build(two)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.state[two[0]]["exp_avg"].dtype == torch.float32
    for k in range(3, 6):
        step(one, first, k)
        step(two, second, k)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
