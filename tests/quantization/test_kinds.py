"""Kinds by name, and which weights of a model they pack."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto import AutoModelForCausalLM

from tests.models.oracle import SIZES
from tests.models.support import LATENT, SPECIAL
from tests.tiny_checkpoint import tiny_config
from torchtune.errors import ConfigError, MissingDependencyError
from torchtune.models.build import build_model
from torchtune.quantization.int4 import Int4Weight
from torchtune.quantization.int8 import Int8Weight
from torchtune.quantization.kinds import packable, packer
from torchtune.quantization.nf4 import NF4Weight


@pytest.mark.parametrize(("kind", "expected"), [("nf4", NF4Weight), ("int8", Int8Weight), ("int4", Int4Weight)])
def test_a_kind_by_its_name(kind, expected):
    """Packs as the class does."""
    weight = torch.randn(8, 64)
    packed = packer(kind)(weight)
    assert type(packed) is expected
    assert torch.equal(packed.dense(torch.float32), expected.pack(weight).dense(torch.float32))


def test_double_quantization_is_an_option():
    """On by default, as in QLoRA."""
    weight = torch.randn(64, 64)
    assert packer("nf4")(weight).absmax.dtype == torch.uint8
    assert packer("nf4", double_quantization=False)(weight).absmax.dtype == torch.float32


def test_another_kind_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'nf4'") as caught:
        packer("fp4")
    assert caught.value.problems[0].key == "base_quantization"


@pytest.mark.parametrize(("kind", "package"), [("nf4", "bitsandbytes"), ("int8", "torchao"), ("int4", "torchao")])
def test_an_absent_library_is_named(kind, package, monkeypatch):
    """With the extra that installs it, before any weight is read."""
    monkeypatch.setitem(sys.modules, package, None)
    for module in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(MissingDependencyError, match=f"base_quantization {kind}") as caught:
        packer(kind)
    assert (caught.value.package, caught.value.extra) == (package, package)


@pytest.mark.slow
def test_the_libraries_say_nothing():
    """Imported alone they warn of kernels that nothing here uses."""
    code = "from torchtune.quantization.kinds import packer; packer('nf4'); packer('int8')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def linear_layers(config, left_out):
    """The weights of linear layers of transformers' model but for the named ones, by its own names."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = [name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    return sorted(f"{name}.weight" for name in linear if not name.endswith(left_out))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi", "gemma2"])
def test_the_linear_layers_of_a_model_are_packed(model_type):
    """All that transformers has, without the head."""
    sizes = (
        tiny_config()
        if model_type == "llama"
        else AutoConfig.for_model(model_type, **SIZES | SPECIAL.get(model_type, {}))
    )
    with torch.device("meta"):
        model = build_model(sizes.to_dict())
    names = packable(model)
    assert sorted(names) == linear_layers(sizes, ("lm_head",))
    assert set(names) <= set(dict(model.named_parameters()))


def test_experts_are_packed_and_routers_are_not():
    """Qwen2-MoE has all there is: experts, a shared one and its gate."""
    config = AutoConfig.for_model("qwen2_moe", **SIZES | {"num_experts": 4, "num_experts_per_tok": 2})
    with torch.device("meta"):
        model = build_model(config.to_dict())
    last = {name.partition("layers.0.")[2] for name in packable(model) if "layers.0." in name}
    attention = {f"self_attn.{name}_proj.weight" for name in "qkvo"}
    shared = {f"mlp.shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert last == attention | shared | {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}


def test_latent_attention_is_packed():
    """DeepSeek's low-rank projections are linear layers; its router is not."""
    config = AutoConfig.for_model("deepseek_v2", **SIZES | LATENT)
    with torch.device("meta"):
        model = build_model(config.to_dict())
    names = packable(model)
    assert {n.split(".")[-2] for n in names if "self_attn" in n} == {
        "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj",
    }  # fmt: skip
    assert not [name for name in names if name.endswith(("gate.weight", "norm.weight", "embed_tokens.weight"))]
