"""Parameters stepped as their gradients arrive, against one optimizer after the backward pass."""

from functools import partial

import pytest
import torch
from torch import nn

from torchtune.checkpoint.training_state import load_optimizer_tensors, optimizer_tensors
from torchtune.distributed.mesh import MeshSizes, open_mesh
from torchtune.distributed.part import holding, local
from torchtune.errors import ConfigError
from torchtune.models.build import build_model
from torchtune.parallel.fsdp import apply_fsdp
from torchtune.parallel.gradients import GradientSums
from torchtune.training.activation_checkpointing import apply_activation_checkpointing
from torchtune.training.lr_schedulers import LRSchedule
from torchtune.training.optimizer_in_backward import check_optimizer_in_backward
from torchtune.training.optimizers import ParamGroup, build_optimizer
from torchtune.training.stepped import SteppedParameters

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,  # the embedding's gradient comes from both ends of the model
}
ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
GROUPS = [ParamGroup("norm", {"lr": 0.03})]


def random_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = build_model(LLAMA)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


class Run:
    """A model and its optimizer, stepped as a recipe does."""

    def __init__(self, in_backward, *, dtype=torch.float32, build=ADAMW):
        self.model = random_model(dtype)
        trained = dict(self.model.named_parameters())
        early = {parameter: parameter for parameter in trained.values()} if in_backward else None
        self.optimizer = build_optimizer(trained, build, GROUPS, weight_decay=0.1, early=early)
        self.schedule = LRSchedule(self.optimizer, name="cosine", num_warmup_steps=2, min_lr_ratio=0.1)
        self.names = {parameter: name for name, parameter in trained.items()}

    def train(self, *steps):
        for step in steps:
            self.schedule.set_lr(step, step / 6)
            torch.manual_seed(step)
            self.optimizer.seed = step
            ids = torch.randint(0, 31, (2, 9))
            (self.model(ids, labels=ids) / 18).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def same_weights(self, other):
        ours, theirs = (dict(run.model.named_parameters()) for run in (self, other))
        return all(ours[name].equal(theirs[name]) for name in theirs)

    def resumed(self, in_backward, **options):
        """Another run that goes on from here, through what a checkpoint keeps."""
        other = Run(in_backward, **options)
        other.model.load_state_dict(self.model.state_dict())
        other.schedule.warmup_progress = self.schedule.warmup_progress
        load_optimizer_tensors(other.optimizer, other.names, *optimizer_tensors(self.optimizer, self.names))
        return other


@pytest.mark.parametrize("build", [ADAMW, partial(torch.optim.SGD, lr=0.1, momentum=0.9)])
def test_the_same_bits_as_one_optimizer_after_it(build):
    """With warm-up, decay, a group of its own rate, a tied head."""
    plain, early = Run(False, build=build).train(1, 2, 3), Run(True, build=build).train(1, 2, 3)
    assert early.same_weights(plain)
    assert not early.same_weights(Run(True))


def test_no_two_gradients_exist_together():
    """With layers that are computed again."""
    at_each_step = []

    class Counting(torch.optim.AdamW):
        def step(self, closure=None):
            at_each_step.append(sum(parameter.grad is not None for parameter in run.model.parameters()))
            return super().step(closure)

    run = Run(True, build=Counting)
    apply_activation_checkpointing(run.model.model.layers)
    run.train(1)
    assert at_each_step == [1] * len(run.names)


@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
def test_resumes_to_the_same_bits(before, after):
    """Also from and to a run with one optimizer."""
    unbroken = Run(before).train(1, 2, 3, 4)
    assert Run(before).train(1, 2).resumed(after).train(3, 4).same_weights(unbroken)


def test_what_was_read_is_kept_again():
    """A checkpoint before the first step after resuming."""
    run = Run(True).train(1)
    again = run.resumed(True)
    expected, _ = optimizer_tensors(run.optimizer, run.names)
    found, _ = optimizer_tensors(again.optimizer, again.names)
    assert found.keys() == expected.keys()
    assert all(found[key].equal(expected[key]) for key in expected)


def test_rounding_and_dropout_do_not_hear_of_each_other():
    """Rounded alike on ranks whose dropout draws otherwise; and what draws next goes on from where it was."""
    runs = [Run(True, dtype=torch.bfloat16) for _ in range(2)]
    ids = torch.arange(18).view(2, 9)
    for index, run in enumerate(runs):
        torch.manual_seed(index)
        expected = torch.rand(())
        torch.manual_seed(index)
        run.model(ids, labels=ids).backward()
        assert torch.rand(()) == expected
    assert runs[0].same_weights(runs[1])


def test_bf16_parameters_resume_to_the_same_bits():
    """Rounded at random, by the step's seed; their moments stay float32."""
    unbroken = Run(True, dtype=torch.bfloat16).train(1, 2, 3)
    again = Run(True, dtype=torch.bfloat16).train(1, 2).resumed(True, dtype=torch.bfloat16).train(3)
    assert again.same_weights(unbroken)
    tensors, _ = optimizer_tensors(again.optimizer, again.names)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert not Run(True, dtype=torch.bfloat16).train(1).same_weights(Run(True, dtype=torch.bfloat16))


def test_norms_are_those_of_the_gradients():
    """Until the step, after which they are forgotten."""
    plain, early = Run(False), Run(True)
    for run in (plain, early):
        ids = torch.arange(18).view(2, 9)
        run.model(ids, labels=ids).backward()
    expected = {name: parameter.grad.norm() for name, parameter in plain.model.named_parameters()}
    found = {early.names[stepped]: norm for stepped, norm in early.optimizer.gradient_norms.items()}
    torch.testing.assert_close(found, expected)
    early.optimizer.step()
    assert not early.optimizer.gradient_norms


def _sharded(sizes, in_backward):
    """Weights and norm after three steps of a model that FSDP shards; norms' weights are summed afterwards."""
    with open_mesh(sizes, torch.device("cpu")) as mesh:
        model = random_model()
        apply_fsdp(model, mesh, dtype=torch.float32)
        for module in model.modules():  # as reading a checkpoint does; FSDP pads uneven shares when it first runs
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, holding(parameter, local(parameter.detach()).clone()))
        parameters, sums = SteppedParameters(model), GradientSums(model, mesh)
        early = None
        if in_backward:
            trained = dict(model.named_parameters())
            early = {trained[name]: stepped for name, stepped in parameters.by_name.items() if "norm" not in name}
        optimizer = build_optimizer(parameters.by_name, ADAMW, GROUPS, weight_decay=0.1, early=early)
        for step in (1, 2, 3):
            torch.manual_seed(10 * step + mesh.tokens.rank)
            ids = torch.randint(0, 31, (1, 9))
            model(ids, labels=ids).backward()
            if in_backward:
                assert all(parameter.grad is None for parameter in early)
            parameters.take_gradients()
            sums.sum(parameters.by_name)
            optimizer.step()
            parameters.forget_gradients()
        return [parameter.detach().clone() for parameter in parameters.by_name.values()]


def _sharded_alike(sizes):
    plain, early = _sharded(sizes, False), _sharded(sizes, True)
    assert all(one.equal(other) for one, other in zip(early, plain, strict=True))


def test_shares_of_fsdp_are_stepped_as_they_arrive(two_ranks):
    """The same bits as after the backward pass."""
    two_ranks.run(_sharded_alike, MeshSizes(shard=2))


def test_copies_of_shares_are_stepped_alike(four_ranks):
    """Their gradients were summed before they arrive."""
    four_ranks.run(_sharded_alike, MeshSizes(replicate=2, shard=2))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"accumulation": 2}, "gradient_accumulation_steps=2"),
        ({"clip_grad_norm": 1.0}, "clip_grad_norm=1.0"),
        ({"dtype": torch.float16}, "dtype=fp16"),
        ({"sizes": MeshSizes(replicate=2, shard=1)}, "data_parallel_shard"),
        ({"sizes": MeshSizes(context=2, shard=1)}, "data_parallel_shard"),
        ({"cpu_offload": True}, "fsdp_cpu_offload"),
    ],
)
def test_what_needs_all_gradients_is_refused(changes, said):
    plain = {"accumulation": 1, "clip_grad_norm": float("inf"), "dtype": torch.bfloat16, "cpu_offload": False}
    plain["sizes"] = MeshSizes(replicate=2, shard=2, tensor=2)
    check_optimizer_in_backward(**plain)
    with pytest.raises(ConfigError) as error:
        check_optimizer_in_backward(**plain | changes)
    (problem,) = error.value.problems
    assert problem.key == "optimizer_in_bwd"
    assert said in problem.message
