"""What the loop does with numbers: infinities, narrow types, activation checkpointing, compile, freezing."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from torchtune.distributed.mesh import Mesh
from torchtune.errors import TrainingError
from torchtune.modules.decoder import CausalLM
from torchtune.parallel.gradients import GradientSums
from torchtune.recipes.full_finetune import FullFinetuneRecipe
from torchtune.training.gradients import clip_gradients

SGD = {"_component_": "torch.optim.SGD", "lr": 0.1}


def weights(recipe):
    return {name: parameter.detach().clone() for name, parameter in recipe._model.named_parameters()}


def test_case_c102_an_infinite_gradient_stops_the_run_before_it_reaches_the_weights(train, tmp_path):
    """The step, the parameter and the loss are named; the checkpoint of the step before stands."""
    out, calls, recipes = tmp_path / "inf", [], []

    def poison(gradient):
        calls.append(1)
        if len(calls) == 2:
            gradient = gradient.clone()
            gradient.view(-1)[3] = math.inf
        return gradient

    class Poisoned(FullFinetuneRecipe):
        def _setup_model(self, params, ckpt_dict):
            self.poisoned = model = super()._setup_model(params, ckpt_dict)
            recipes.append(self)
            model.get_parameter("model.layers.1.self_attn.q_proj.weight").register_hook(poison)
            return model

    with pytest.raises(TrainingError, match=r"step 2: .*q_proj\.weight"):
        train(output_dir=str(out), max_steps=4, save_every_n_steps=1, recipe_class=Poisoned)
    assert all(parameter.isfinite().all() for parameter in recipes[0].poisoned.parameters())
    assert [folder.name for folder in out.glob("step_*")] == ["step_1"]


def test_case_c102_measuring_the_norm_changes_no_gradient():
    """clip_grad_norm null and inf measure alone; the norm is that of all elements in one vector, in float64."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,))]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    before = [parameter.grad.clone() for parameter in parameters]
    named = {str(index): parameter for index, parameter in enumerate(parameters)}
    sums = GradientSums(torch.nn.ParameterDict(named), Mesh())
    norm = sums.norm(named, torch.device("cpu"))
    flat = torch.cat([gradient.flatten().double() for gradient in before])
    assert norm.item() == pytest.approx(flat.pow(2).sum().sqrt().item(), rel=1e-6)
    for limit in (None, math.inf, 1e9):
        clip_gradients(parameters, limit, norm)
        assert all(torch.equal(p.grad, b) for p, b in zip(parameters, before, strict=True))
    clip_gradients(parameters, 0.5, norm)
    assert sums.norm(named, torch.device("cpu")).item() == pytest.approx(0.5, rel=1e-4)


def test_case_c098_the_logged_rate_is_the_one_used(train, tmp_path):
    """The weight's change over the gradient, step by step, of plain SGD."""
    rates = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            group = self.param_groups[0]
            parameter = group["params"][0]
            before, gradient = parameter.detach().clone(), parameter.grad.clone()
            super().step(closure)
            place = gradient.abs().argmax()
            rates.append(((before - parameter.detach()).flatten()[place] / gradient.flatten()[place]).item())

    import tests.recipes.test_numerics as here

    here.Watched = Watched
    _, metrics = train(
        optimizer={"_component_": "tests.recipes.test_numerics.Watched", "lr": 0.5},
        lr_scheduler={"name": "cosine", "num_warmup_steps": 2},
        max_steps=4,
    )
    assert rates == pytest.approx([line["lr"] for line in metrics], rel=1e-3)
    assert min(rates) > 0


def test_fp16_loss_scale_is_resumed(train, tmp_path):
    """The scale and the count of steps since it changed go on; losses and weights equal the unbroken run's."""
    keys = {"dtype": "fp16", "max_steps": 4, "save_every_n_steps": 2, "keep_last": None, "save_last": True}
    whole, metrics = train(output_dir=str(tmp_path / "whole"), **keys)
    out = tmp_path / "whole"
    expected = (out / "step_4" / "model.safetensors").read_bytes()
    state = whole._optimization.grad_scaler.state_dict()
    assert state["_growth_tracker"] == 4
    resumed, again = train(output_dir=str(out), resume_from_checkpoint=str(out / "step_2"), **keys)
    assert resumed._optimization.grad_scaler.state_dict() == state
    assert [line["loss"] for line in again] == [line["loss"] for line in metrics]
    assert (out / "step_4" / "model.safetensors").read_bytes() == expected


def test_fp16_overflow_skips_the_step_and_halves_the_scale(train):
    """A scale that overflows on purpose: the weights stay, the run goes on."""
    before = {}

    class Large(FullFinetuneRecipe):
        def _setup_optimizer(self, params, ckpt_dict):
            optimizer = super()._setup_optimizer(params, ckpt_dict)
            self._optimization.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
            before.update(weights(self))
            return optimizer

    recipe, metrics = train(dtype="fp16", max_steps=1, recipe_class=Large)
    assert math.isfinite(metrics[0]["loss"])
    assert recipe._optimization.grad_scaler.get_scale() == 2.0**59
    assert all(torch.equal(value, before[name]) for name, value in weights(recipe).items())


def test_bf16_parameters_are_rounded_stochastically_and_resume(train, tmp_path):
    """param_dtype=bf16: half the memory; what is stored is bf16, follows fp32's loss, and resumes to the same bits."""
    keys = {"param_dtype": "bf16", "max_steps": 4, "save_every_n_steps": 2, "keep_last": None, "save_last": True}
    out = tmp_path / "bf16"
    recipe, metrics = train(output_dir=str(out), **keys)
    assert {parameter.dtype for parameter in recipe._model.parameters()} == {torch.bfloat16}
    _, exact = train(output_dir=str(tmp_path / "fp32"), max_steps=4)
    assert [line["loss"] for line in metrics] == pytest.approx([line["loss"] for line in exact], rel=0.02)
    expected = (out / "step_4" / "model.safetensors").read_bytes()
    train(output_dir=str(out), resume_from_checkpoint=str(out / "step_2"), **keys)
    assert (out / "step_4" / "model.safetensors").read_bytes() == expected


def test_activation_checkpointing_keeps_less(train, tmp_path):
    """Bytes that autograd keeps between forward and backward, by its own hooks: at most half of the plain run's."""
    kept = {}
    for enabled in (False, True):
        storages = {}

        def pack(tensor, storages=storages):
            if not isinstance(tensor, torch.nn.Parameter):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        class Counting(FullFinetuneRecipe):
            def _setup_model(self, params, ckpt_dict, pack=pack):
                model = super()._setup_model(params, ckpt_dict)
                hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
                model.model.register_forward_pre_hook(lambda *_: hooks.__enter__())
                model.model.register_forward_hook(lambda *_: hooks.__exit__())
                return model

        train(
            max_steps=1,
            enable_activation_checkpointing=enabled,
            output_dir=str(tmp_path / str(enabled)),
            recipe_class=Counting,
        )
        kept[enabled] = sum(storages.values())
    assert 0 < kept[True] < kept[False] / 2


@pytest.mark.timeout(300)
def test_case_c083_saves_under_compile_and_checkpointing_have_plain_names(train, tmp_path):
    """Intermediate and last saves alike; compiled losses stay within 1e-4 of the plain ones."""
    keys = {"max_steps": 2, "save_every_n_steps": 1, "save_last": True}
    _, plain = train(output_dir=str(tmp_path / "plain"), **keys)
    recipe, compiled = train(
        output_dir=str(tmp_path / "compiled"), compile=True, enable_activation_checkpointing=True, **keys
    )
    assert [line["loss"] for line in compiled] == pytest.approx([line["loss"] for line in plain], rel=1e-4)
    for step in (1, 2):
        names = [
            set(load_file(tmp_path / kind / f"step_{step}" / "model.safetensors")) for kind in ("plain", "compiled")
        ]
        assert names[0] == names[1]
    assert isinstance(recipe._model, CausalLM)


def test_frozen_parameters_stay_and_the_others_move(train):
    """`freeze` by name pattern; with activation checkpointing every trained parameter still has a gradient (C086)."""
    start = {}

    class Noting(FullFinetuneRecipe):
        def _setup_optimizer(self, params, ckpt_dict):
            start.update(weights(self))
            return super()._setup_optimizer(params, ckpt_dict)

    recipe, _ = train(
        freeze=["embed_tokens", r"layers\.0\."],
        enable_activation_checkpointing=True,
        optimizer=SGD,
        max_steps=1,
        recipe_class=Noting,
    )
    moved = {name for name, value in weights(recipe).items() if not torch.equal(value, start[name])}
    assert moved == {name for name in start if "layers.1." in name or name == "model.norm.weight"}


def test_case_c090_rates_and_moments_go_on(train, tmp_path):
    """Cosine with warm-up and AdamW, resumed at step 3 of 6: rates and moments are those of the unbroken run."""
    keys = {"max_steps": 6, "save_every_n_steps": 3, "keep_last": None, "save_last": True}
    keys |= {"lr_scheduler": {"name": "cosine", "num_warmup_steps": 2}}
    out = tmp_path / "whole"
    _, metrics = train(output_dir=str(out), **keys)
    moments = (out / "step_6" / "recipe_state" / "optimizer.safetensors").read_bytes()
    _, again = train(output_dir=str(out), resume_from_checkpoint=str(out / "step_3"), **keys)
    assert [line["lr"] for line in again] == [line["lr"] for line in metrics]
    assert (out / "step_6" / "recipe_state" / "optimizer.safetensors").read_bytes() == moments
    state = json.loads((out / "step_6" / "recipe_state" / "state.json").read_text())
    assert state["total_training_steps"] == 6
