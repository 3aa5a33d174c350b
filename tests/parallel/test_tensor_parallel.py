"""Tensor parallelism against the same model on one device, in float64."""

import pytest

from tests.models.support import config_of
from tests.parallel.same_model import (
    check_loaded_is_cut_alike,
    check_tensor_parallel_model,
    held_places,
    on_meta,
    refusal_of,
)
from torchtune.adapters.lora import LoRALinear
from torchtune.distributed.mesh import Axis
from torchtune.errors import ConfigError, UnsupportedError
from torchtune.models.build import FILES
from torchtune.modules.feed_forward import FeedForward
from torchtune.modules.linear import Linear
from torchtune.modules.losses import LinearCrossEntropy
from torchtune.parallel.splits import split_outputs
from torchtune.parallel.tensor_sizes import check_tensor_parallel


def _config(model_type, **changes):
    return config_of(model_type).to_dict() | changes


@pytest.mark.parametrize("model_type", sorted(FILES))
def test_equals_the_whole_model(two_ranks, model_type):
    """Loss, logits and every gradient, for every family; 97 rows of the vocabulary, so 49 and 48."""
    assert min(two_ranks.run(check_tensor_parallel_model, _config(model_type))) > 0


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("cohere", {"use_qk_norm": True, "attention_bias": True}),
        ("deepseek_v2", {"q_lora_rank": None, "mlp_bias": True, "attention_bias": True}),
        ("deepseek_v3", {"attention_bias": True}),
        ("glm4_moe", {"use_qk_norm": True}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gpt_oss", {"output_router_logits": True, "router_aux_loss_coef": 0.3}),
        ("granitemoeshared", {"output_router_logits": True, "router_aux_loss_coef": 0.3}),
        ("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 0.3}),
        ("olmoe", {"clip_qkv": 0.3}),
        ("phi", {"qk_layernorm": True}),
        ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": True}),
    ],
)
def test_options_of_families(two_ranks, model_type, changes):
    """Biases, norms of heads, latent queries, and the load-balancing loss, whose gradient must not count twice."""
    two_ranks.run(check_tensor_parallel_model, _config(model_type, **changes))


@pytest.mark.parametrize("model_type", ["llama", "olmo2", "gpt_oss", "qwen2_moe"])
def test_four_ranks(four_ranks, model_type):
    four_ranks.run(check_tensor_parallel_model, _config(model_type, num_key_value_heads=4))


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"targets": ["all-linear"]}),
        ("llama", {"targets": ["all-linear", "lm_head", "embed_tokens"]}),
        ("llama", {"targets": ["attention"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
        ("llama", {"targets": ["all-linear"], "use_dora": True}),
        ("gpt2", {"targets": ["all-linear"], "use_dora": True}),
        ("phi", {"targets": ["all-linear", "lm_head"]}),
        ("phi3", {"targets": ["all-linear"]}),
        ("gpt_neox", {"targets": ["all-linear"]}),
        ("deepseek_v3", {"targets": ["all-linear"], "use_dora": True}),
        ("qwen2_moe", {"targets": ["all-linear", "experts", "gate"]}),
        ("gpt_oss", {"targets": ["experts", "router"]}),
        ("granitemoeshared", {"targets": ["all-linear", "experts"]}),
    ],
)
def test_adapters(two_ranks, model_type, options):
    """Updates are split as the layers that they belong to."""
    changes = {"attention_bias": True, "mlp_bias": True} if model_type == "llama" else {}
    assert min(two_ranks.run(check_tensor_parallel_model, _config(model_type, **changes), options)) > 0


@pytest.mark.parametrize("model_type", ["qwen3", "mixtral"])
def test_activation_checkpointing(two_ranks, model_type):
    """A layer that is computed again sends again what it sent, and keeps no second router logits."""
    two_ranks.run(check_tensor_parallel_model, _config(model_type, output_router_logits=True), None, True)


@pytest.mark.slow
def test_compiled(two_ranks):
    """Layers are compiled with their collectives, one for all, and checkpointing goes around."""
    config = _config("llama", num_hidden_layers=2)
    two_ranks.run(check_tensor_parallel_model, config, None, True, True, timeout_s=200)


@pytest.mark.parametrize(
    ("model_type", "lora"),
    [("phi3", {"targets": ["all-linear"], "use_dora": True}), ("gpt_oss", None), ("stablelm", None)],
)
def test_a_loaded_model_is_cut_alike(two_ranks, model_type, lora):
    """Two stretches, gate and up in turn, a row for each head."""
    two_ranks.run(check_loaded_is_cut_alike, _config(model_type, qk_layernorm=True), lora)


def test_a_pissa_adapter_is_not_split_once_loaded():
    """What its matrices began as would stay whole."""
    layer = LoRALinear(Linear(4, 4), rank=2, scale=1.0)
    layer.initial = layer.lora_A.weight.detach(), layer.lora_B.weight.detach()
    with pytest.raises(UnsupportedError, match="before"):
        split_outputs(layer, Axis(2))


def test_tokens_that_can_not_be_shared(two_ranks):
    """A batch that does not divide is refused by each rank, with the remedy."""
    for message in two_ranks.run(refusal_of, _config("llama"), 7):
        assert message.startswith("a batch of 7 tokens")
        assert "padded_to(2)" in message


def test_ids_beyond_the_vocabulary_are_not_taken_for_zeros(two_ranks):
    """The rank at that end still looks them up, and fails as one device does."""
    first, last = two_ranks.run(held_places, 5, [-1, 0, 2, 3, 4, 5])
    assert first == ([-1, 0, 2, 0, 0, 0], [True, True, True, False, False, False])
    assert last == ([0, 0, 0, 0, 1, 2], [False, False, False, True, True, True])


@pytest.mark.parametrize(
    ("model_type", "changes", "size", "expected"),
    [
        ("llama", {}, 4, ["num_key_value_heads=2"]),
        ("llama", {}, 3, ["num_attention_heads=4", "num_key_value_heads=2"]),
        ("llama", {"intermediate_size": 49}, 2, ["intermediate_size=49"]),
        ("llama", {"vocab_size": 5, "num_key_value_heads": 4}, 4, ["vocab_size=5"]),
        ("gpt_neox", {"num_attention_heads": 1}, 2, ["num_attention_heads=1", "num_key_value_heads=1"]),
        ("deepseek_v3", {"moe_intermediate_size": 25}, 2, ["intermediate_size=25"]),
        ("llama", {}, 2, []),
        ("llama", {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}, 1, []),
    ],
)
def test_sizes_that_do_not_divide(model_type, changes, size, expected):
    """All of them at once, by name and number."""
    model = on_meta(_config(model_type, **changes))
    assert _problems(model, size) == [("tensor_parallel", name) for name in expected]


def _problems(model, size, **options):
    """Key and first word of each problem."""
    try:
        check_tensor_parallel(model, size, **options)
    except ConfigError as error:
        return [(problem.key, problem.message.split()[0]) for problem in error.problems]
    return []


def test_a_refusal_says_what_would_do():
    with pytest.raises(ConfigError, match="'model.layers.0.self_attn' does not divide by 4.*: 1, 2$"):
        check_tensor_parallel(on_meta(_config("llama")), 4)


class OwnLoss(LinearCrossEntropy):
    def forward(self, hidden, weight, targets, *, softcap=None):
        return super().forward(hidden, weight, targets, softcap=softcap)


def test_a_loss_that_takes_no_shared_vocabulary():
    """It would see a part of the logits and not know; it is refused by its name."""
    model = on_meta(_config("llama"))
    assert _problems(model, 2, loss=OwnLoss()) == [("loss", f"'{__name__}.OwnLoss'")]
    assert _problems(model, 1, loss=OwnLoss()) == []
    assert _problems(model, 2, loss=LinearCrossEntropy()) == []
    assert _problems(model, 2, loss=lambda hidden, weight, targets, **options: 0) == []


class OwnFeedForward(FeedForward):
    pass


def test_parts_that_are_not_known():
    """A family from outside may have blocks that nothing here can split; its own kinds of ours are ours."""
    model = on_meta(_config("llama"))
    model.model.layers[1].mlp = Linear(32, 32)
    model.model.layers[2].mlp = OwnFeedForward(32, 48)
    with pytest.raises(ConfigError) as error:
        check_tensor_parallel(model, 2)
    (problem,) = error.value.problems
    assert problem.key == "tensor_parallel"
    assert "'1.mlp' of the layers, a Linear" in problem.message
