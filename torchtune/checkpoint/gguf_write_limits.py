"""What a GGUF file can say and llama.cpp does not load, or computes otherwise: tests/checkpoint/test_llama_cpp.py ran it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchtune.errors import UnsupportedError
from torchtune.models.config import HFConfig

# By their number of layers llama.cpp tells models whose files have no key for what they have or lack.
LITE_LAYERS, NORMED_LAYERS = (26, 27), 64
# Families whose window it ignores, where the file has it.
WITHOUT_WINDOW = ("phi3", "starcoder2")


def refuse_what_is_read_otherwise(config: HFConfig) -> None:
    """Raise where llama.cpp would refuse the file, or compute another model.

    Args:
        config: with its family's defaults.
    Raises:
        UnsupportedError: names the key, its value and what llama.cpp does.
    """
    layers, kind = config.num_hidden_layers, config.model_type
    if kind == "cohere" and bool(config.get("use_qk_norm")) != (layers >= NORMED_LAYERS):
        _refuse(
            f"use_qk_norm: {config.get('use_qk_norm')} with {layers} layers",
            f"expects norms of queries and keys from {NORMED_LAYERS} layers on, and below it none",
        )
    if kind in ("deepseek_v2", "deepseek_v3") and (config.get("q_lora_rank") is None) != (layers in LITE_LAYERS):
        _refuse(
            f"q_lora_rank: {config.get('q_lora_rank')} with {layers} layers",
            f"expects none with {' or '.join(map(str, LITE_LAYERS))} layers, and one with any other number",
        )
    if kind == "deepseek_v2" and config.topk_method == "group_limited_greedy" and config.topk_group < config.n_group:
        _refuse("topk_method: group_limited_greedy", "ranks groups of experts by their two best, and not by their best")


def notes_on_reading(config: HFConfig, rope: Mapping[str, Any]) -> list[str]:
    """What llama.cpp computes otherwise for some lengths of text, in lines for people.

    Args:
        rope: the rotary options in the newer spelling.
    """
    notes = []
    window, longest = config.get("sliding_window"), int(config.max_position_embeddings)
    if config.model_type in WITHOUT_WINDOW and window and window < longest:
        notes.append(f"llama.cpp knows no sliding_window here: beyond {window} tokens it sees more than the model does")
    if rope["rope_type"] == "longrope":
        original = rope.get("original_max_position_embeddings") or longest
        notes.append(
            f"llama.cpp takes the rotary factors of long texts wherever its own context is longer than {original} "
            f"tokens, for short texts too; give it one of at most {original} for these"
        )
    return notes


def _refuse(what: str, why: str) -> None:
    raise UnsupportedError(f"config.json: {what} can't be written to a GGUF file: llama.cpp {why}")
