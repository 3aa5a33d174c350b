"""A GGUF file's metadata as the files of a Hugging Face folder: config, generation config and tokenizer."""

from __future__ import annotations

from typing import Any

import numpy as np

from torchtune.checkpoint.gguf import ARCHITECTURES, GGUFFile
from torchtune.errors import UnsupportedError
from torchtune.tokenizers.gguf import gguf_tokenizer

NAMES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """The config.json that this file's metadata and tensors amount to."""
    arch = file.architecture

    def get(key: str, default: Any = None) -> Any:
        return file.metadata.get(f"{arch}.{key}", default)

    model_type = ARCHITECTURES[arch]
    hidden_size, num_heads = int(get("embedding_length")), file.num_heads
    config: dict[str, Any] = {
        "architectures": [
            {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[arch]
        ],
        "model_type": model_type,
        "vocab_size": file.headers["model.embed_tokens.weight"].shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": int(get("feed_forward_length")),
        "num_hidden_layers": int(get("block_count")),
        "num_attention_heads": num_heads,
        "num_key_value_heads": file.num_kv_heads,
        "head_dim": int(get("attention.key_length") or hidden_size // num_heads),
        "hidden_act": "silu",
        "max_position_embeddings": int(get("context_length")),
        "rms_norm_eps": _decimal(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(get("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "lm_head.weight" not in file.headers,
        "torch_dtype": str(next(iter(file.headers.values())).dtype).removeprefix("torch."),
    }
    if arch != "qwen2":
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in file.headers
    if scaling := _rope_scaling(file, get, config):
        config["rope_scaling"] = scaling
    for name in ("bos", "eos", "padding"):
        token_id = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token_id is not None:
            config[f"{NAMES[name]}_id"] = int(token_id)
    return config


def _rope_scaling(file: GGUFFile, get: Any, config: dict[str, Any]) -> dict[str, Any] | None:
    if file.rope_factors is not None:
        return _llama3_scaling(file.rope_factors, config)
    kind = get("rope.scaling.type")
    if kind in (None, "none"):
        return None
    if kind not in ("linear", "yarn"):
        raise UnsupportedError(f"{file.path}: rope scaling '{kind}' is not supported; linear, yarn and llama3's are")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": _decimal(get("rope.scaling.factor"))}
    if original := get("rope.scaling.original_context_length"):
        scaling["original_max_position_embeddings"] = int(original)
    return scaling


def _llama3_scaling(factors: np.ndarray, config: dict[str, Any]) -> dict[str, Any]:
    """Llama 3.1 and later keep what each frequency is divided by; the options behind it are found again."""
    factor, low, high, original = float(factors.max()), 1.0, 4.0, 8192
    head_dim = config["head_dim"]
    inv_freq = config["rope_theta"] ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelength = 2 * np.pi / inv_freq
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not np.allclose(expected, factors, rtol=1e-4):
        raise UnsupportedError("the GGUF file's rope_freqs are not Llama 3.1's; open the original checkpoint instead")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _decimal(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05, where the file holds 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def hf_generation_config(file: GGUFFile) -> dict[str, Any]:
    """The generation_config.json: which tokens begin and end."""
    found = {}
    for name in ("bos", "eos", "padding"):
        token_id = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token_id is not None:
            found[{"padding": "pad"}.get(name, name) + "_token_id"] = int(token_id)
    return found


def hf_tokenizer(file: GGUFFile) -> tuple[bytes, dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json that encode as this file's tokenizer does.

    Raises:
        UnsupportedError: a kind of tokenizer that is not known here.
    """
    try:
        return gguf_tokenizer(file.metadata)
    except UnsupportedError as error:
        raise UnsupportedError(f"{file.path}: {error}") from error
