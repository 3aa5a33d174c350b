"""Update layers by themselves, against their formulas written out in float64, and the transform that places them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.models.support import config_of
from torchtune.adapters.adapter import LowRankUpdate, adapter_of, fill
from torchtune.adapters.config import LoRAConfig
from torchtune.adapters.init import init_lora
from torchtune.adapters.lora import ExpertsUpdate, LoRAEmbedding, LoRALinear, RouterUpdate, apply_lora
from torchtune.errors import CheckpointError
from torchtune.models.build import build_model
from torchtune.modules.linear import Conv1D, Embedding, Linear
from torchtune.modules.stored import stored_tensors, unstored_parameters

IN, OUT, RANK, SCALE = 6, 5, 3, 0.7


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def built(model_type="llama", **changes):
    """A family's small model, random, in float64."""
    torch.manual_seed(0)
    config = config_of(model_type)
    config.update(changes)
    return build_model(config.to_dict()).double()


@torch.no_grad()
def randomised(module):
    """All its parameters random, in float64."""
    module.double()
    for parameter in module.parameters():
        parameter.normal_()
    return module


def lora_layer(*, out=OUT, rank=RANK, transposed=False, bias=True, **options):
    layer = (Conv1D if transposed else Linear)(IN, out, bias=bias)
    layer.weight.requires_grad_(False)
    return randomised(LoRALinear(layer, rank=rank, scale=SCALE, **options))


def written_out(layer, x):
    """The formulas of the two papers: W + s B A, and its rows stretched to the magnitudes."""
    w = layer.weight.T if layer.transposed else layer.weight
    whole = w + SCALE * layer.lora_B.weight @ layer.lora_A.weight
    if layer.lora_magnitude_vector is not None:
        # The length is a constant to the gradient (Liu et al., 2024, section 4.3).
        whole = whole * (layer.lora_magnitude_vector / whole.detach().norm(dim=1))[:, None]
    return F.linear(x, whole, layer.bias)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_its_formula(use_dora, transposed, bias):
    """Output, and the gradients of x, A, B, magnitude and bias; none of the frozen weight."""
    layer = lora_layer(transposed=transposed, bias=bias, use_dora=use_dora)
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 4, IN, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, expected = layer(x), written_out(twin, y)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(x.grad, y.grad)
    for (name, mine), theirs in zip(layer.named_parameters(), twin.parameters(), strict=True):
        assert (mine.grad is None) == (name == "weight")
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("use_dora", [False, True])
def test_layers_of_one_input_together(use_dora):
    """As each by itself; ranks and scales may differ."""
    layers = [lora_layer(out=out, rank=rank, use_dora=use_dora) for out, rank in ((5, 3), (7, 1), (4, 6))]
    x = torch.randn(4, IN, dtype=torch.float64)
    for found, layer in zip(LoRALinear.together(layers, x), layers, strict=True):
        torch.testing.assert_close(found, layer(x))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_of_a_silu_product(use_dora, transposed):
    """As of the product itself."""
    layer = lora_layer(use_dora=use_dora, transposed=transposed)
    gate, up = torch.randn(2, 4, IN, dtype=torch.float64)
    torch.testing.assert_close(layer.of_silu_product(gate, up), layer(F.silu(gate) * up))


@pytest.mark.parametrize("transposed", [False, True])
def test_row_norms_are_those_of_the_merged_matrix(transposed):
    """Without making it; also after A and B have moved."""
    layer = lora_layer(transposed=transposed)
    for _ in range(2):
        w = layer.weight.T if transposed else layer.weight
        torch.testing.assert_close(
            layer.row_norms(), (w + SCALE * layer.lora_B.weight @ layer.lora_A.weight).norm(dim=1)
        )
        with torch.no_grad():
            layer.lora_A.weight.mul_(-2)


def test_row_norms_where_the_update_takes_the_row_away():
    """A row of nothing has the length nothing, not that of rounding below zero."""
    layer = LoRALinear(Linear(IN, OUT, bias=False), rank=OUT, scale=1.0)
    with torch.no_grad():
        layer.lora_B.weight.copy_(torch.eye(OUT))
        layer.lora_A.weight.copy_(-layer.weight)
    assert torch.isfinite(layer.row_norms()).all()
    torch.testing.assert_close(layer.row_norms(), torch.zeros(OUT), atol=1e-3, rtol=0)


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_is_on_what_the_update_sees_alone(use_dora):
    """In training, of a share as asked for, drawn anew; none in evaluation."""
    layer = lora_layer(dropout=0.25, use_dora=use_dora)
    x = torch.ones(4000, IN, dtype=torch.float64)
    torch.manual_seed(1)
    out = layer(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.25)
    assert (dropped == 0).double().mean().item() == pytest.approx(0.25, abs=0.02)
    norms = layer.lora_magnitude_vector / layer.row_norms() if use_dora else 1.0
    update = SCALE * dropped @ layer.lora_A.weight.T @ layer.lora_B.weight.T
    torch.testing.assert_close(out, (x @ layer.weight.T + update) * norms + layer.bias)
    assert not layer(x).equal(layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), written_out(layer, x))


def test_dropout_of_layers_together_is_each_ones_own():
    """Queries and keys do not lose the same inputs; and of_silu_product drops too."""
    one, other = lora_layer(dropout=0.5), lora_layer(dropout=0.5)
    x = torch.randn(50, IN, dtype=torch.float64)
    first, second = LoRALinear.together([one, other], x)
    assert not first.equal(second)
    torch.manual_seed(2)
    found = one.of_silu_product(x, x)
    torch.manual_seed(2)
    torch.testing.assert_close(found, one(F.silu(x) * x))


def test_an_embedding_is_its_formula():
    """W[id] + s A[:, id]^T B^T, with gradients."""
    torch.manual_seed(0)
    layer = randomised(LoRAEmbedding(Embedding(9, 4), rank=2, scale=SCALE))
    ids = torch.tensor([[3, 3], [0, 8]])
    whole = layer.weight + SCALE * (layer.lora_embedding_B @ layer.lora_embedding_A).T
    torch.testing.assert_close(layer(ids), whole[ids])
    assert torch.autograd.gradcheck(
        lambda a, b: torch.func.functional_call(layer, {"lora_embedding_A": a, "lora_embedding_B": b}, ids),
        (layer.lora_embedding_A.detach().requires_grad_(), layer.lora_embedding_B.detach().requires_grad_()),
    )


def test_experts_and_routers_are_their_formulas():
    """Rows by expert, one of them without a row."""
    torch.manual_seed(0)
    update = randomised(ExpertsUpdate(3, IN, OUT, rank=RANK, scale=SCALE))
    x, counts = torch.randn(7, IN, dtype=torch.float64), torch.tensor([4, 0, 3])
    expert = torch.repeat_interleave(torch.arange(3), counts)
    products = SCALE * update.lora_B.weight @ update.lora_A.weight  # [E, out, in]
    torch.testing.assert_close(update(x, counts), torch.einsum("toi,ti->to", products[expert], x))
    router = randomised(RouterUpdate(IN, OUT, rank=RANK, scale=SCALE))
    torch.testing.assert_close(router(x), SCALE * x @ (router.lora_B.weight @ router.lora_A.weight).T)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_loss_of_an_adapted_head_is_that_of_its_logits(softcap):
    """The fused loss never makes them; value and gradients of A and B, in a model."""
    model = built(
        "gemma2" if softcap else "llama",
        tie_word_embeddings=False,
        **({"final_logit_softcapping": softcap} if softcap else {}),
    )
    apply_lora(model, LoRAConfig(rank=3, alpha=5.0, targets=("lm_head",)))
    head = randomised(model.double()).lm_head
    ids = torch.randint(0, 97, (2, 8))
    labels = torch.where(torch.rand(2, 8) < 0.7, ids.roll(-1, 1), -100)
    loss = model(ids, labels=labels)
    expected = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected)
    parameters = (head.lora_A.weight, head.lora_B.weight)
    for found, wanted in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def init_magnitudes(model):
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, LoRALinear) and layer.lora_magnitude_vector is not None:
                layer.lora_magnitude_vector.copy_(layer.row_norms())


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2_moe", "deepseek_v2", "gemma2"])
def test_a_fresh_adapter_changes_nothing(model_type):
    """B is zero, magnitudes are the rows' lengths: training begins at the base."""
    ids = torch.randint(0, 97, (2, 9))
    for config in (
        LoRAConfig(rank=3),
        LoRAConfig(rank=3, use_dora=True),
        LoRAConfig(rank=3, init="gaussian", use_rslora=True),
    ):
        model = built(model_type)
        expected = model(ids)
        apply_lora(model, config)
        model.double()
        init_lora(model, config.init)
        init_magnitudes(model)
        torch.testing.assert_close(model(ids), expected)


def test_what_is_trained_and_what_is_stored():
    """The update and what is trained whole, and no more; the base keeps its names and its files know no update."""
    model = built("mixtral")
    before = set(model.state_dict()), set(stored_tensors(model))
    config = LoRAConfig(rank=3, targets=("q_proj", "experts", "gate", "embed_tokens"), modules_to_save=("norm",))
    targets = apply_lora(model, config)
    own = unstored_parameters(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(own) | {"model.norm.weight"}
    assert {name.rpartition(".lora_")[0].removesuffix(".update") for name in own} == {
        name.replace(".experts.", ".experts.updates.") for name in targets.names
    }
    assert len(own) == 2 * len(targets.names)
    assert set(stored_tensors(model)) == before[1]
    assert {name for name in model.state_dict() if "lora" not in name} == before[0]


def test_the_device_is_the_layers():
    """On the meta device nothing is allocated."""
    with torch.device("meta"):
        model = build_model(config_of("qwen2_moe").to_dict())
    apply_lora(model, LoRAConfig(rank=3, targets=("all-linear", "experts", "gate", "embed_tokens")))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_hooks_on_a_projection_are_honoured():
    """Someone who looks at queries sees them, though the three projections are one product else."""
    model = built()
    apply_lora(model, LoRAConfig(rank=3))
    randomised(model)
    ids = torch.randint(0, 97, (1, 5))
    expected, seen = model(ids), []
    for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
        model.model.layers[1].get_submodule(name).register_forward_hook(lambda *args: seen.append(args))
    torch.testing.assert_close(model(ids), expected)
    assert len(seen) == 3


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_merging_gives_the_layers_matrix(transposed, use_dora):
    """The merged matrix alone gives the layer's output."""
    layer = lora_layer(transposed=transposed, bias=False, use_dora=use_dora)
    update = LowRankUpdate(layer.lora_A.weight, layer.lora_B.weight, SCALE, layer.lora_magnitude_vector)
    merged = update.merge_into(layer.weight, transposed=transposed)
    x = torch.randn(4, IN, dtype=torch.float64)
    torch.testing.assert_close(F.linear(x, merged.T if transposed else merged), layer(x))


def test_an_adapter_is_filled_into_a_model_that_fits_alone():
    """What either side has and the other has not is named, and so is another shape."""

    def model_with(**options):
        model = built()
        config = LoRAConfig(**{"rank": 3, "targets": ("q_proj", "v_proj"), **options})
        apply_lora(model, config)
        return randomised(model), config

    source, config = model_with()
    adapter = adapter_of(source, config)
    target, _ = model_with()
    fill(target, adapter)
    for name, parameter in source.named_parameters():
        if "lora" in name:
            assert parameter.equal(target.get_parameter(name)), name
    for options, message in (
        ({"targets": ("q_proj",)}, "an update of 'model.layers.0.self_attn.v_proj', which this run does not train"),
        ({"targets": ("attention",)}, "no update of 'model.layers.0.self_attn.k_proj', which this run trains"),
        ({"modules_to_save": ("norm",)}, "nothing of 'model.norm.weight', which this run trains"),
        ({"rank": 2}, r"'model.layers.0.self_attn.q_proj' is \(3, 32\), and this run's \(2, 32\)"),
        ({"use_dora": True}, "q_proj' has a magnitude"),
    ):
        with pytest.raises(CheckpointError, match=message):
            fill(model_with(**options)[0], adapter)


def test_the_weights_are_the_bases_own():
    """No copy is made of what is adapted."""
    model = built()
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    apply_lora(model, LoRAConfig(rank=3, targets=("all-linear", "embed_tokens", "lm_head")))
    assert all(model.get_parameter(name).data_ptr() == pointer for name, pointer in before.items())
    assert isinstance(model.model.layers[0].mlp.up_proj, LoRALinear)
    assert isinstance(model.model.embed_tokens, LoRAEmbedding)
    assert not isinstance(model.lm_head, nn.Linear)
