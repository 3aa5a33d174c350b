"""What targets name, and what is said of those that name nothing."""

import random
from functools import cache

import pytest
import torch

from tests.models.support import config_of
from torchtune.adapters.config import LoRAConfig
from torchtune.adapters.lora import apply_lora
from torchtune.adapters.targets import find_targets, find_whole
from torchtune.errors import ConfigError
from torchtune.models.build import FILES, build_model


def meta_model(model_type):
    """A family's small model without weights."""
    with torch.device("meta"):
        return build_model(config_of(model_type).to_dict())


shared = cache(meta_model)  # for what leaves the model as it is


def problems_of(model_type, **options):
    """What is said of a config: keys and messages."""
    with pytest.raises(ConfigError) as error:
        apply_lora(meta_model(model_type), LoRAConfig(**{"rank": 4, **options}))
    return [(problem.key, problem.message) for problem in error.value.problems]


def problem_of(model_type, **options):
    (problem,) = problems_of(model_type, **options)
    return problem


def last_names(names):
    return {name.rpartition(".")[2] for name in names}


@pytest.mark.parametrize(
    ("model_type", "target", "expected"),
    [
        ("llama", "all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("llama", "attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("llama", "mlp", {"gate_proj", "up_proj", "down_proj"}),
        ("llama", "self_attn.q_proj", {"q_proj"}),
        ("llama", r".*\.(q|v)_proj", {"q_proj", "v_proj"}),
        ("llama", "lm_head", {"lm_head"}),
        ("llama", "embed_tokens", {"embed_tokens"}),
        ("gpt2", "all-linear", {"c_attn", "c_proj", "c_fc"}),
        ("gpt2", "mlp", {"c_proj", "c_fc"}),
        ("gpt2", "attn.c_proj", {"c_proj"}),
        ("phi3", "mlp", {"gate_up_proj", "down_proj"}),
        ("deepseek_v3", "attention", {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}),
        ("qwen2_moe", "mlp", {"gate_proj", "up_proj", "down_proj"}),
        ("qwen2_moe", "shared_expert_gate", {"shared_expert_gate"}),
        ("mixtral", "all-linear", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mixtral", "experts", {"gate_up_proj", "down_proj"}),
        ("mixtral", "experts.down_proj", {"down_proj"}),
        ("mixtral", "gate", {"gate"}),
        ("gpt_oss", "router", {"router"}),
    ],
)
def test_a_target_names(model_type, target, expected):
    """Groups, ends of names, regular expressions; heads, embeddings, experts and routers where they are named."""
    found = find_targets(shared(model_type), [target]).names
    assert last_names(found) == expected


@pytest.mark.parametrize("model_type", sorted(FILES))
def test_all_linear_is_every_linear_layer_of_the_blocks(model_type):
    """And neither head nor embedding, router, or the gate of a shared expert."""
    model = shared(model_type)
    linears = {name for name, module in model.named_modules() if getattr(module, "is_linear", False)}
    left_out = {name for name in linears if name.endswith(("lm_head", "embed_out", "shared_expert_gate"))}
    found = find_targets(model, ["all-linear"])
    assert set(found.names) == linears - left_out
    parts = [set(_found_or_nothing(model, group)) for group in ("attention", "mlp")]
    assert parts[0] | parts[1] == set(found.names)
    assert not parts[0] & parts[1]


def _found_or_nothing(model, group):
    try:
        return find_targets(model, [group]).names
    except ConfigError:
        return ()


def test_ends_are_whole_parts():
    """`proj` ends no name, and `1.mlp.up_proj` is not that of layer 11."""
    config = config_of("llama")
    config.update({"num_hidden_layers": 12})
    with torch.device("meta"):
        model = build_model(config.to_dict())
    assert find_targets(model, ["1.mlp.up_proj"]).names == ("model.layers.1.mlp.up_proj",)
    with pytest.raises(ConfigError):
        find_targets(model, ["proj"])


@pytest.mark.parametrize("layers", [[0], [-1], [2, 0], [1, 1, -2]])
def test_a_subset_of_layers(layers):
    """Numbers from either end; each once."""
    found = find_targets(shared("llama"), ["all-linear", "q_proj"], layers=layers).names
    assert {int(name.split(".")[2]) for name in found} == {index % 3 for index in layers}
    assert len(found) == len(set(found)) == 7 * len({index % 3 for index in layers})


@pytest.mark.parametrize(
    ("model_type", "target", "message"),
    [
        ("llama", "q_prj", "no layer of this model is called 'q_prj'; did you mean 'q_proj'?"),
        ("llama", "Q_PROJ", "no layer of this model is called 'Q_PROJ'; did you mean 'q_proj'?"),
        ("llama", "all_linear", "no layer of this model is called 'all_linear'; did you mean 'all-linear'?"),
        ("llama", "attentions", "no layer of this model is called 'attentions'; did you mean 'attention'?"),
        ("llama", "mlp.q_proj", "no layer of this model is called 'mlp.q_proj'; did you mean 'self_attn.q_proj'?"),
        ("llama", "q_proj.weight", "no layer of this model is called 'q_proj.weight'; did you mean 'q_proj'?"),
        ("llama", "layers.7.mlp.up_proj", "did you mean 'layers.2.mlp.up_proj'?"),
        ("llama", "", "an empty name names no layer"),
        ("llama", "experts", "this model has nothing that 'experts' names; known: all-linear, attention, down_proj"),
        ("gpt2", "q_proj", "did you mean 'c_proj'?"),
        ("phi3", "q_proj", "did you mean 'qkv_proj'?"),
        ("mixtral", "down_proj", "no layer of this model is called 'down_proj'; did you mean 'experts.down_proj'?"),
        ("mixtral", "mlp.experts.down_proj", "did you mean 'block_sparse_moe.experts.down_proj'?"),
        ("mixtral", "mlp", "this model has nothing that 'mlp' names; known: all-linear, attention, embed_tokens"),
        ("mixtral", "gats", "did you mean 'gate'?"),
        ("llama", "input_layernorm", "'input_layernorm' is no linear layer; modules_to_save trains it whole"),
        ("llama", "self_attn", "'self_attn' is no linear layer"),
        ("llama", "q_(proj", "'q_(proj' is no regular expression: missing ), unterminated subpattern"),
        ("llama", "*proj", "'*proj' is no regular expression: nothing to repeat"),
        ("llama", r".*\.x_proj", r"no layer of this model is called '.*\.x_proj'; did you mean"),
        (
            "gemma2",
            "lm_head",
            "'lm_head' is tied to the embedding and owns no weight, so it takes no adapter; modules_to_save=[lm_head]",
        ),
        ("gemma2", "embed_tokens", "'model.embed_tokens' is the head too (tie_word_embeddings)"),
        ("gpt2", "wte", "'transformer.wte' is the head too (tie_word_embeddings)"),
    ],
)
def test_a_target_that_names_nothing(model_type, target, message):
    """What was asked for, and the nearest name or what there is."""
    key, said = problem_of(model_type, targets=(target,))
    assert key == "lora_targets"
    assert message in said


def test_misspellings_are_answered_with_the_name():
    """A letter dropped, doubled or exchanged, wherever it is."""
    generator = random.Random(0)
    names = {
        model_type: sorted(last_names(find_targets(shared(model_type), ["all-linear"]).names)) for model_type in FILES
    }
    tried = 0
    for model_type, known in names.items():
        for name in known:
            at = generator.randrange(len(name) - 1)
            wrong = generator.choice(
                [
                    name[:at] + name[at + 1 :],
                    name[:at] + name[at] + name[at:],
                    name[:at] + name[at + 1] + name[at] + name[at + 2 :],
                ]
            )
            if wrong in known or wrong == name or "." in wrong:
                continue
            with pytest.raises(ConfigError) as error:
                find_targets(shared(model_type), [wrong])
            assert f"'{wrong}'" in str(error.value)
            assert "did you mean '" in str(error.value)
            tried += 1
    assert tried > 150


@pytest.mark.parametrize("layers", [(3,), (-4,), (0, 5)])
def test_a_layer_that_is_not_there(layers):
    """Which, and which there are."""
    key, said = problem_of("llama", layers=layers)
    assert key == "lora_layers"
    assert f"{layers[-1]} is no layer of this model: they are 0 to 2, or -1 to -3" in said


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("deepseek_v3", {"targets": ("experts",), "layers": (0,)}),
        ("llama", {"targets": ("lm_head",), "layers": (1,)}),
        ("llama", {"layers": ()}),
    ],
)
def test_layers_without_a_target(model_type, options):
    """DeepSeek's first layer has no experts; the head is in no layer."""
    key, said = problem_of(model_type, **options)
    assert key == "lora_layers"
    assert f"no target lies in the layers {list(options['layers'])}" in said


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        (
            "llama",
            {"rank": 33},
            "rank 33 does not fit 'model.layers.0.self_attn.q_proj': its matrix is 32 x 32; give it at most 32",
        ),
        ("llama", {"rank": 17}, "'model.layers.0.self_attn.k_proj': its matrix is 16 x 32; give it at most 16"),
        (
            "llama",
            {"rank_pattern": {"layers.1.mlp.up_proj": 33}},
            "rank 33 does not fit 'model.layers.1.mlp.up_proj': its matrix is 48 x 32",
        ),
        (
            "llama",
            {"rank": 40, "targets": ("embed_tokens",)},
            "'model.embed_tokens': its matrix is 32 x 97; give it at most 32",
        ),
        ("qwen2_moe", {"targets": ("shared_expert_gate",)}, "its matrix is 1 x 32; give it at most 1"),
        (
            "mixtral",
            {"rank": 33, "targets": ("experts",)},
            "experts.gate_up_proj': its matrix is 96 x 32; give it at most 32",
        ),
        ("mixtral", {"rank": 5, "targets": ("gate",)}, "gate': its matrix is 4 x 32; give it at most 4"),
        ("gpt2", {"rank": 33}, "c_attn': its matrix is 96 x 32; give it at most 32"),
    ],
)
def test_a_rank_above_the_matrix(model_type, options, message):
    """The layer, its sizes and what it can have."""
    key, said = problem_of(model_type, **options)
    assert key == "lora_rank"
    assert message in said


def test_a_rank_as_large_as_the_matrix_fits():
    """The bound itself is allowed, and so is any in an adapter that exists."""
    assert apply_lora(meta_model("llama"), LoRAConfig(rank=16)).names
    assert apply_lora(meta_model("llama"), LoRAConfig(rank=64), is_given=True).names


@pytest.mark.parametrize(
    ("model_type", "name", "message"),
    [
        ("llama", "embed_token", "no module of this model is called 'embed_token'; did you mean 'embed_tokens'?"),
        ("llama", "lm_heads", "did you mean 'lm_head'?"),
        ("gemma2", "lm_heads", "did you mean 'lm_head'?"),
        ("llama", "Norm", "did you mean 'norm'?"),
        ("mixtral", "gates", "did you mean 'gate'?"),
        ("gpt2", "norm", "no module of this model is called 'norm'"),
    ],
)
def test_a_whole_module_that_is_misspelt(model_type, name, message):
    """As for targets."""
    key, said = problem_of(model_type, modules_to_save=(name,))
    assert key == "modules_to_save"
    assert message in said


def test_whole_modules():
    """By the ends of their names; a tied head is the embedding."""
    assert find_whole(shared("llama"), ["norm", "lm_head"]) == ["model.norm", "lm_head"]
    assert find_whole(shared("gemma2"), ["lm_head", "embed_tokens"]) == ["model.embed_tokens"]
    assert find_whole(shared("mixtral"), ["layers.1.block_sparse_moe.gate"]) == ["model.layers.1.block_sparse_moe.gate"]


@pytest.mark.parametrize("whole", ["q_proj", "self_attn", "model.layers.1", "layers"])
def test_nothing_is_trained_whole_and_adapted(whole):
    """The module and a layer of it are named."""
    key, said = problem_of("llama", modules_to_save=(whole,))
    assert key == "modules_to_save"
    assert "is trained whole, so 'model.layers." in said
    assert "q_proj' takes no adapter too" in said


@pytest.mark.parametrize("which", ["rank", "alpha"])
@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "q_prj",
            "'q_prj' (2) fits no adapted layer; one is 'model.layers.0.self_attn.q_proj'; did you mean 'q_proj'?",
        ),
        ("lm_head", "'lm_head' (2) fits no adapted layer; one is 'model.layers.0.self_attn.q_proj'"),
        (r"layers\.3\..*", r"'layers\.3\..*' (2) fits no adapted layer"),
        ("q_(", "'q_(' is no regular expression: missing ), unterminated subpattern"),
    ],
)
def test_a_pattern_without_a_layer(which, pattern, message):
    """It would be for nothing."""
    key, said = problem_of("llama", **{f"{which}_pattern": {pattern: 2}})
    assert key == f"lora_{which}_pattern"
    assert message in said


def test_patterns_are_ends_or_whole_names():
    """The first that fits wins, as PEFT has it."""
    config = LoRAConfig(rank=8, alpha=4.0, rank_pattern={"q_proj": 2, r".*\.1\..*": 3, "model.layers.0.mlp.up_proj": 5})
    names = ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj", "xq_proj")
    assert [config.rank_of(name) for name in names] == [2, 3, 5, 8]


@pytest.mark.parametrize(
    ("model_type", "key", "options", "message"),
    [
        ("mixtral", "lora_dropout", {"targets": ("experts",), "dropout": 0.1}, "none on experts"),
        ("mixtral", "use_dora", {"targets": ("gate",), "use_dora": True}, "none on routers"),
        ("llama", "use_dora", {"targets": ("embed_tokens",), "use_dora": True}, "none on the embedding"),
        ("llama", "use_dora", {"targets": ("lm_head",), "use_dora": True}, "none on the head ('lm_head')"),
        ("llama", "lora_init", {"init": "pissa", "use_dora": True}, "'pissa' is for plain LoRA"),
        ("mixtral", "lora_init", {"init": "pissa", "targets": ("experts",)}, "'pissa' is for plain LoRA"),
        ("llama", "lora_targets", {"targets": ()}, "nothing would be trained"),
    ],
)
def test_what_does_not_go_together(model_type, key, options, message):
    """The key, and what to leave out."""
    found, said = problem_of(model_type, **options)
    assert found == key
    assert message in said


def test_all_problems_are_told_at_once():
    """Nothing has to be found out one run after another, and the model is as it was."""
    said = problems_of("llama", targets=("q_prj", "v_proj"), modules_to_save=("nrm",), rank=100, layers=(9,))
    assert [key for key, _ in said] == ["lora_targets", "lora_layers", "modules_to_save", "lora_rank"]
    model = meta_model("llama")
    with pytest.raises(ConfigError):
        apply_lora(model, LoRAConfig(rank=100))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("lora" in name for name, _ in model.named_parameters())
