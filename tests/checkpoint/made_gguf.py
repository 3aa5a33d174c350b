"""GGUF files written from Hugging Face models, a row at a time: what the reader is held to.

The layout was checked once, file by file, by having llama.cpp itself compute the logits of what is written here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize

from tests.tiny_checkpoint import tiny_tokenizer

F32 = gguf.GGMLQuantizationType.F32
# Those whose rotary embedding turns neighbours in the file and halves in Hugging Face's code.
REORDERED = {"llama", "mistral3", "granite", "granitemoe", "smollm3"}


def write(
    path: Path,
    arch: str,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, Any],
    *,
    kind: gguf.GGMLQuantizationType = F32,
    tokenizer: bool = False,
) -> Path:
    """A file of tensors under the file's own names; the metadata's keys are those of the architecture.

    Args:
        kind: of the matrices.
        tokenizer: with the tiny one.
    """
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        add_value(writer, f"{arch}.{key}", value)
    if tokenizer:
        _add_tokenizer(writer)
    for name, value in tensors.items():
        if value.ndim > 1 and kind != F32:
            writer.add_tensor(name, quantize(np.ascontiguousarray(value), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """A value under the type that its Python type stands for."""
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    adders[type(value)](key, value)


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokenizer = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocab = {**tokenizer["model"]["vocab"], **{t["content"]: t["id"] for t in tokenizer["added_tokens"]}}
    tokens = sorted(vocab, key=vocab.__getitem__)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(3)
    writer.add_chat_template("{{ messages }}")


def metadata_of(config: Any, **more: Any) -> dict[str, Any]:
    """The keys that nearly all architectures have; None leaves one out."""
    num_heads = config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    eps = getattr(config, "rms_norm_eps", None)
    layer_eps = next((getattr(config, n) for n in ("layer_norm_eps", "norm_epsilon") if hasattr(config, n)), None)
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": getattr(config, "intermediate_size", None),
        "vocab_size": config.vocab_size,
        "attention.head_count": num_heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or num_heads,
        "attention.layer_norm_rms_epsilon": eps,
        "attention.layer_norm_epsilon": None if eps else layer_eps,
        "rope.freq_base": float(rope["rope_theta"]) if "rope_theta" in rope else None,
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    return {key: value for key, value in values.items() if value is not None}


def as_in_file(
    arch: str, config: Any, tensors: Mapping[str, np.ndarray], *, keys_and_values_apart: bool = False
) -> dict[str, np.ndarray]:
    """A Hugging Face checkpoint's tensors under the names and in the layout of the file.

    Args:
        keys_and_values_apart: DeepSeek's `kv_b` in two, as newer files have it.
    """
    number = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    found: dict[str, np.ndarray] = {}
    lists: dict[str, dict[int, np.ndarray]] = {}
    for name, value in tensors.items():
        for new_name, new_value in _parts(arch, config, name, value):
            many = re.search(r"\.(?:experts|norms)\.(\d+)\.", new_name)
            stem, _, suffix = re.sub(r"\.(experts|norms)\.\d+\.", r".\1.", new_name).rpartition(".")
            stem = stem.replace("_layernorm.norms", "_layernorm")
            in_file = f"{names.get_name(stem)}.{suffix}"
            assert not in_file.startswith("None"), f"no name for {name}"
            if many:
                lists.setdefault(in_file, {})[int(many[1])] = new_value
            else:
                found[in_file] = new_value.squeeze()
    if keys_and_values_apart:
        for name in [name for name in found if "attn_kv_b" in name]:
            heads = found.pop(name).reshape(config.num_attention_heads, -1, config.kv_lora_rank)
            nope = config.qk_nope_head_dim
            found[name.replace("kv_b", "k_b")] = np.stack([head[:nope].T for head in heads])
            found[name.replace("kv_b", "v_b")] = np.stack([head[nope:] for head in heads])
    return found | {name: np.stack([parts[i] for i in range(len(parts))]) for name, parts in lists.items()}


def _parts(arch: str, config: Any, name: str, value: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """What a tensor becomes, still under Hugging Face's kind of names."""
    if arch in REORDERED and (match := re.search(r"\.([qk])_proj\.", name)):
        heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
        return [(name, value[_neighbours(len(value), heads)])]
    if arch in ("gemma", "gemma2", "gemma3") and name.endswith("norm.weight"):
        return [(name, value + 1)]
    if arch == "gpt2" and re.search(r"\.c_(attn|fc|proj)\.weight$", name):
        return [(name, value.T)]
    if arch == "gptneox" and ".query_key_value." in name:
        head_dim = len(value) // config.num_attention_heads // 3
        rows = [
            head * 3 * head_dim + which * head_dim + row
            for which in range(3)
            for head in range(config.num_attention_heads)
            for row in range(head_dim)
        ]
        return [(name, value[rows])]
    if arch == "granitemoe" and "input_linear" in name:
        half = value.shape[-2] // 2
        base = name.split("block_sparse_moe")[0].split("shared_mlp")[0] + "mlp."
        kind = "shared_expert" if "shared_mlp" in name else "experts"
        gate, up = value[..., :half, :], value[..., half:, :]
        return [(f"{base}{kind}.gate_proj.weight", gate), (f"{base}{kind}.up_proj.weight", up)]
    if arch == "gpt-oss":
        return _gpt_oss(name, value)
    if arch == "llama4" and name.endswith("experts.gate_up_proj"):
        base = name.removesuffix("gate_up_proj")
        half = value.shape[2] // 2
        gate, up = value[:, :, :half], value[:, :, half:]
        return [
            (f"{base}gate_proj.weight", gate.transpose(0, 2, 1)),
            (f"{base}up_proj.weight", up.transpose(0, 2, 1)),
        ]
    if arch == "llama4" and name.endswith("experts.down_proj"):
        return [(f"{name}.weight", value.transpose(0, 2, 1))]
    if "e_score_correction_bias" in name:
        return [(name.replace("correction_bias", "correction.bias"), value)]
    return [(name, value)]


def _gpt_oss(name: str, value: np.ndarray) -> list[tuple[str, np.ndarray]]:
    if name.endswith("sinks"):
        return [(f"{name}.weight", value)]
    if name.endswith("gate_up_proj"):
        base = name.removesuffix("gate_up_proj")
        by_row = value.transpose(0, 2, 1)
        return [(f"{base}gate_proj.weight", by_row[:, ::2]), (f"{base}up_proj.weight", by_row[:, 1::2])]
    if name.endswith("gate_up_proj_bias"):
        base = name.removesuffix("gate_up_proj_bias")
        return [(f"{base}gate_proj.bias", value[:, ::2]), (f"{base}up_proj.bias", value[:, 1::2])]
    if name.endswith("experts.down_proj"):
        return [(f"{name}.weight", value.transpose(0, 2, 1))]
    if name.endswith("experts.down_proj_bias"):
        return [(name.replace("_bias", ".bias"), value)]
    return [(name, value)]


def _neighbours(num_rows: int, num_heads: int) -> list[int]:
    """For each row of the file, the checkpoint's row: the two halves of a head take turns."""
    head_dim = num_rows // num_heads
    rows = []
    for head in range(num_heads):
        for pair in range(head_dim // 2):
            rows += [head * head_dim + pair, head * head_dim + head_dim // 2 + pair]
    return rows
