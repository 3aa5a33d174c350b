"""Training an adapter step by step as PEFT does: the same base, the same beginning, the same batches and optimizer."""

from functools import partial

import pytest
import torch
from peft import PeftConfig
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file

from tests.adapters.peft_oracle import adapted, load_peft, own_keys
from tests.adapters.same_steps import check_same_steps, of_all
from tests.models.oracle import save_random
from tests.models.support import config_of
from torchtune.adapters.config import LoRAConfig
from torchtune.recipes.lora_finetune import LoRAFinetuneParams
from torchtune.recipes.lora_params import lora_groups
from torchtune.training.optimizers import build_param_groups

ADAMW = partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.1)
SGD = partial(torch.optim.SGD, lr=2e-2, momentum=0.9)


def check_same_training(folder, ours, theirs, optimizers):
    """As the steps are, so is what is written: the same names, and values within 1e-4."""
    check_same_steps(ours.model, theirs, optimizers)
    ours.save(folder / "ours")
    theirs.save_pretrained(folder / "theirs")
    found, expected = (load_file(folder / side / "adapter_model.safetensors") for side in ("ours", "theirs"))
    assert own_keys(found) == own_keys(expected)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-4, msg=lambda text, name=name: name + text)


PATTERNS = {"rank_pattern": {"q_proj": 2, r"layers\.1\..*": 3}, "alpha_pattern": {"o_proj": 1.0, "layers.1.mlp.*": 9}}


@pytest.mark.parametrize(
    ("model_type", "optimizer", "options"),
    [
        ("llama", ADAMW, {}),
        ("llama", SGD, {"rank": 1, "alpha": 3.0, "targets": ("q_proj", "down_proj")}),
        ("llama", ADAMW, {"rank": 8, "use_rslora": True, "targets": ("attention",)}),
        ("llama", ADAMW, {"use_dora": True}),
        ("llama", SGD, {"use_dora": True, "use_rslora": True, "targets": (r".*\.[0-1]\.mlp\..*", "v_proj")}),
        ("llama", ADAMW, PATTERNS | {"layers": (0, 1)}),
        (
            "llama",
            SGD,
            {"layers": (-1,), "use_dora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1}},
        ),
        ("llama", ADAMW, {"modules_to_save": ("embed_tokens", "lm_head", "norm", "input_layernorm")}),
        ("llama", ADAMW, {"targets": ("k_proj", "embed_tokens", "lm_head")}),
        ("qwen2", SGD, {"use_dora": True, "targets": ("q_proj", "mlp")}),
        ("gpt2", ADAMW, {"modules_to_save": ("ln_f",)}),
        ("gpt2", SGD, {"use_dora": True, "rank": 7}),
        ("phi3", ADAMW, {"targets": ("qkv_proj", "gate_up_proj")}),
        ("mixtral", ADAMW, {"targets": ("all-linear", "experts"), "modules_to_save": ("gate",)}),
        ("qwen3_moe", SGD, {"targets": ("experts.down_proj",), "alpha": 20.0}),
        ("gpt_oss", ADAMW, {"targets": ("experts", "o_proj"), "alpha_pattern": {"down_proj": 2.0}}),
        ("deepseek_v3", ADAMW, {"targets": ("all-linear", "experts")}),
        ("qwen2_moe", ADAMW, {"targets": ("mlp", "gate"), "rank_pattern": {r".*\.1\..*": 2}}),
    ],
)
def test_trains_as_peft(tmp_path, model_type, optimizer, options):
    """20 steps in fp32: LoRA, rsLoRA and DoRA, other ranks, targets, patterns and layers, whole modules, experts."""
    save_random(tmp_path / "base", config_of(model_type))
    ours = adapted(tmp_path / "base", LoRAConfig(**{"rank": 4, "alpha": 6.0, **options}))
    theirs = load_peft(tmp_path / "base", ours.save(tmp_path / "begin"), is_trainable=True)
    check_same_training(tmp_path, ours, theirs, (of_all(optimizer), of_all(optimizer)))


def test_trains_a_tied_head_as_peft(tmp_path):
    """One matrix on both sides, where PEFT is told to keep it one; its gradient is the embedding's and the head's."""
    save_random(tmp_path / "base", config_of("gemma2"))
    ours = adapted(tmp_path / "base", LoRAConfig(rank=4, alpha=6.0, modules_to_save=("lm_head",)))
    config = PeftConfig.from_pretrained(ours.save(tmp_path / "begin"))
    config.ensure_weight_tying, config.inference_mode = True, False
    theirs = load_peft(tmp_path / "base", tmp_path / "begin", is_trainable=True, config=config)
    check_same_training(tmp_path, ours, theirs, (of_all(SGD), of_all(SGD)))


def test_lora_plus_trains_as_peft(tmp_path):
    """lora_B has a rate of its own, the embedding's B too."""
    save_random(tmp_path / "base", config_of("llama"))
    ours = adapted(tmp_path / "base", LoRAConfig(rank=4, alpha=6.0))
    theirs = load_peft(tmp_path / "base", ours.save(tmp_path / "begin"), is_trainable=True)
    groups = lora_groups(LoRAFinetuneParams(model_checkpoint="x", dataset="x", loraplus_lr_ratio=16))

    def our_optimizer(model):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        made = build_param_groups(trained, [], weight_decay=None, defaults=groups)
        return torch.optim.AdamW([{**g, "lr": 1e-3 * g.get("lr_ratio", 1)} for g in made], weight_decay=0.0)

    def their_optimizer(model):
        return create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, weight_decay=0.0)

    check_same_training(tmp_path, ours, theirs, (our_optimizer, their_optimizer))
