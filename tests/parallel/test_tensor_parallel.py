"""Tensor parallelism against the same model on one device, in float64."""

import pytest

from tests.models.support import config_of
from tests.parallel.same_model import check_loaded_is_cut_alike, check_tensor_parallel_model
from torchtune.models.build import FILES


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


@pytest.mark.parametrize("lora", [None, {"targets": ["all-linear"], "use_dora": True}])
@pytest.mark.parametrize("model_type", ["qwen3", "mixtral"])
def test_compiled(two_ranks, model_type, lora):
    """Layers are compiled with their collectives, and checkpointing goes around."""
    config = _config(model_type, num_hidden_layers=1, layer_types=None)
    two_ranks.run(check_tensor_parallel_model, config, lora, True, True)


@pytest.mark.parametrize("model_type", ["phi3", "gpt_oss", "stablelm"])
def test_a_loaded_model_is_cut_alike(two_ranks, model_type):
    """Two stretches, gate and up in turn, a row for each head."""
    two_ranks.run(check_loaded_is_cut_alike, _config(model_type, qk_layernorm=True))
