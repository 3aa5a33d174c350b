"""The table of docs/models.md: each family by feature, as the checks find it.

    python -m tests.models.support      writes the table anew

A "yes" is a check that passed just now on a random model of the family.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from tests.adapters.peft_oracle import (
    adapted,
    check_same_logits,
    load_peft,
    load_theirs,
    token_ids,
    trained_parameters,
)
from tests.models.oracle import (
    HEADS,
    SIZES,
    assert_close,
    check_against_transformers,
    check_cached,
    check_packed,
    check_round_trip,
    save_random,
)
from tests.parallel.same_model import check_tensor_parallel_model
from tests.ranks import RankPool
from torchtune.checkpoint.gguf_architectures import ARCHITECTURES
from torchtune.checkpoint.gguf_write_keys import WRITTEN, text_config
from torchtune.checkpoint.load import load_model
from torchtune.models.build import FILES, find_family
from torchtune.recipes.export import ExportParams, ExportRecipe

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "models.md"
COLUMNS = ("model_type", "models", "train", "packed", "cache", "saved as it was", "GGUF in", "LoRA", "TP", "GGUF out")
BEGIN, END = "<!-- made by tests/models/support.py -->\n", "<!-- end -->\n"

_MHA = {"num_attention_heads": 4, "num_key_value_heads": 4}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = _MHA | {
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
}
_LLAMA4 = {"head_dim": 8, "intermediate_size_mlp": 40, "num_local_experts": 4, "attention_chunk_size": 7}
_SEEING = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
# What a family's config needs besides, or has otherwise than SIZES and HEADS.
SPECIAL: dict[str, dict[str, Any]] = {
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 6},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "glm4_moe": {"moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 3, "head_dim": 8},
    "gpt2": _MHA | {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 64},
    "gpt_neox": {"num_attention_heads": 4, "hidden_dropout": 0.0},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoeshared": {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 20},
    "llama4_text": _LLAMA4,
    "ministral": {"head_dim": 8, "sliding_window": 6},
    "ministral3": {"head_dim": 8},
    "mistral": {"sliding_window": 6},
    "mixtral": {"num_local_experts": 4},
    "olmo3": {"sliding_window": 6},
    "olmoe": _MHA | {"num_experts": 4, "num_experts_per_tok": 2},
    "phi": _MHA,
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 40},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": _EXPERTS | {"head_dim": 8},
}
# The text part of a model that sees: the kind of its text, and its vision tower.
PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", _SEEING | {"image_size": 28, "patch_size": 14}),
    "llama4": (
        "llama4_text",
        _SEEING
        | {"image_size": 28, "patch_size": 14, "vision_output_dim": 16, "projector_input_dim": 16}
        | {"projector_output_dim": 16},
    ),
    "mistral3": ("mistral", _SEEING | {"model_type": "pixtral", "head_dim": 8, "image_size": 28, "patch_size": 14}),
}

# What llama.cpp has fixed for all models of a kind, as their released checkpoints have it.
AS_RELEASED: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "llama4_text": {"attention_chunk_size": 8192},
    "mistral": {"sliding_window": None},
    "qwen3_moe": {"norm_topk_prob": True},
}


def config_of(model_type: str, changes: Mapping[str, Mapping[str, Any]] | None = None) -> Any:
    """A small config of the family; `changes` are options by model_type."""
    tokens = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    text_type, vision = PARTS.get(model_type, (model_type, {}))
    values = {**SIZES, **HEADS, **tokens, **SPECIAL.get(text_type, {}), **(changes or {}).get(text_type, {})}
    if model_type in PARTS:
        return AutoConfig.for_model(model_type, text_config={"model_type": text_type, **values}, vision_config=vision)
    return AutoConfig.for_model(model_type, **values)


def row(model_type: str, folder: Path, ranks: RankPool) -> str:
    """The family's row, each feature tried."""
    config = config_of(model_type)
    torch.manual_seed(3)
    model = check_against_transformers(folder / "train", config)  # nothing else can be tried without this
    readable = any(model_type in architecture.model_types for architecture in ARCHITECTURES.values())
    found = [
        "yes",
        _tried(lambda: check_packed(model)),
        _tried(lambda: check_cached(model)),
        _tried(lambda: check_round_trip(folder / "saved", config)),
        "as `llama`" if model_type == "mistral" else "yes" if readable else "no",
        _tried(lambda: check_lora(folder / "lora", config)),
        _tried(lambda: ranks.run(check_tensor_parallel_model, config.to_dict())),
        _tried(lambda: check_gguf(folder / "gguf", config_of(model_type, AS_RELEASED)))
        if text_config(config.to_dict())["model_type"] in WRITTEN
        else "no",
    ]
    return f"| `{model_type}` | {find_family(model_type).covers} | {' | '.join(found)} |\n"


def check_lora(folder: Path, config: Any) -> None:
    """Linear layers adapted and a step trained: PEFT gives our logits for the saved adapter, the merged model too."""
    save_random(folder / "base", config)
    ours = adapted(folder / "base")
    ids = token_ids(2, 12)
    ours.model(ids, labels=ids.roll(-1, 1)).backward()
    torch.optim.AdamW(trained_parameters(ours.model).values(), lr=0.1).step()
    fresh = adapted(folder / "base").model
    assert not torch.allclose(ours.model(ids), fresh(ids), rtol=0.01), "the step changed nothing"
    check_same_logits(load_peft(folder / "base", ours.save(folder / "adapter")), ours.model, what="logits in PEFT")
    check_same_logits(load_theirs(ours.save_merged(folder / "merged")), ours.model, what="logits of the merged model")


def check_gguf(folder: Path, config: Any) -> None:
    """Exported as a GGUF file in float32 and read again: the logits of the checkpoint."""
    save_random(folder / "hf", config)
    params = ExportParams(model_checkpoint=str(folder / "hf"), output_dir=str(folder / "out"), format="gguf")
    recipe = ExportRecipe(params)
    recipe.setup(params)
    ids = torch.randint(0, config.get_text_config().vocab_size, (2, 30), generator=torch.Generator().manual_seed(1))
    written = load_model(recipe.export() / "out-F32.gguf")
    assert_close(written(ids), load_model(folder / "hf")(ids), 1e-5, "logits of the GGUF file")


def _tried(check: Callable[[], None]) -> str:
    try:
        check()
    except AssertionError as error:
        print(error, file=sys.stderr)
        return "no"
    return "yes"


def main() -> None:
    """Write the table into the document."""
    head = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}\n"
    with tempfile.TemporaryDirectory() as folder:
        ranks = RankPool(2)
        rows = "".join(row(model_type, Path(folder) / model_type, ranks) for model_type in sorted(FILES))
        ranks.close()
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}{head}{rows}{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
