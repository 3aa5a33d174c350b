"""A GGUF file's metadata as the files of a Hugging Face folder: config, generation config and tokenizer."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from torchtune.checkpoint.gguf import GGUFHeader
from torchtune.checkpoint.gguf_architectures import find_architecture
from torchtune.checkpoint.gguf_keys import decimal
from torchtune.errors import UnsupportedError
from torchtune.tokenizers.gguf import gguf_tokenizer

NAMES = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token"}
ENDS = ("eos", "eot", "eom")  # of a text, a turn, a message
ROPE_FREQS, ROPE_LONG, ROPE_SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
# `mscale_all_dim` is the file's multiplier times this: converters write a tenth of DeepSeek's.
LOG_MULTIPLIERS = {"deepseek2": 10, "mistral3": 1}
# Keys that change what is computed, with the values that change nothing.
NEUTRAL = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_gating_func": (1,),
    "expert_group_count": (0, 1),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.attn_factor": (0.0, 1.0),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "router_logit_softcapping": (0.0,),
}
SCALED_BY_DEFAULT = ("gpt_oss", "ministral3")


def hf_config(file: GGUFHeader) -> dict[str, Any]:
    """The config.json that this file's metadata and tensors amount to.

    Raises:
        CheckpointError: a key or a tensor that it needs is absent.
        UnsupportedError: an architecture, or an option of it, that is not known here.
    """
    config = find_architecture(file).config(file)
    if scaling := _rope_scaling(file, config):
        config["rope_scaling"] = scaling
    _refuse_unread(file, config)
    config["torch_dtype"] = "float32" if file.is_float32 else "bfloat16"
    # Said where there is none, since Hugging Face's defaults are other models' tokens.
    return {**config, **dict.fromkeys(f"{name}_id" for name in NAMES.values()), **_special_tokens(file)}


def _refuse_unread(file: GGUFHeader, config: dict[str, Any]) -> None:
    """Refuse what would change the numbers and is no option of the file's family here."""
    neutral = {**NEUTRAL, "rope.dimension_count": (config.get("head_dim"),)}
    for key in sorted(set(neutral) - file.keys_read):
        value = file.get(key)
        if value is not None and value not in neutral[key]:
            raise UnsupportedError(
                f"{file.path}: {file.architecture}.{key}: {value} is not supported for {config['model_type']}"
            )


def hf_generation_config(file: GGUFHeader) -> dict[str, Any]:
    """The generation_config.json: which tokens begin and end; those that end a turn or a message end it, too."""
    found = _special_tokens(file)
    ends = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ENDS]
    ids = list(dict.fromkeys(int(token_id) for token_id in ends if token_id is not None))
    return {**found, "eos_token_id": ids} if len(ids) > 1 else found


def hf_tokenizer(file: GGUFHeader) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json that encode as this file's tokenizer does; none where it has none.

    Raises:
        UnsupportedError: a kind of tokenizer that is not known here.
    """
    if file.metadata.get("tokenizer.ggml.model") in (None, "none"):
        return {}
    try:
        tokenizer_json, config = gguf_tokenizer(file.metadata)
    except UnsupportedError as error:
        raise UnsupportedError(f"{file.path}: {error}") from error
    return {
        "tokenizer.json": tokenizer_json,
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2).encode(),
    }


def _special_tokens(file: GGUFHeader) -> dict[str, int]:
    found = {name: file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in NAMES}
    return {f"{NAMES[name]}_id": int(token_id) for name, token_id in found.items() if token_id is not None}


def _rope_scaling(file: GGUFHeader, config: dict[str, Any]) -> dict[str, Any] | None:
    if ROPE_FREQS in file.tensors:
        return _llama3_scaling(file, config)
    if ROPE_LONG in file.tensors:
        return _long_scaling(file)
    kind = file.get("rope.scaling.type")
    if kind in (None, "none"):
        # Where Hugging Face's default is a scaling, none has to be said.
        return {"rope_type": "default"} if config["model_type"] in SCALED_BY_DEFAULT else None
    if kind not in ("linear", "yarn"):
        raise UnsupportedError(f"{file.path}: rope scaling '{kind}' is not supported; linear, yarn and llama3's are")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": decimal(file.need("rope.scaling.factor"))}
    if original := file.get("rope.scaling.original_context_length"):
        scaling["original_max_position_embeddings"] = int(original)
    if kind == "yarn":
        scaling |= _yarn_options(file, config)
    return scaling


def _yarn_options(file: GGUFHeader, config: dict[str, Any]) -> dict[str, Any]:
    if file.get("rope.scaling.attn_factor", 1.0) != 1.0:
        raise UnsupportedError(f"{file.path}: rope.scaling.attn_factor is not supported with yarn")
    options: dict[str, Any] = {}
    for name in ("beta_fast", "beta_slow"):
        if value := file.get(f"rope.scaling.yarn_{name}"):
            options[name] = decimal(value)
    if multiplier := file.get("rope.scaling.yarn_log_multiplier"):
        if file.architecture not in LOG_MULTIPLIERS:
            raise UnsupportedError(f"{file.path}: rope.scaling.yarn_log_multiplier is not supported for this model")
        # `mscale` is not in the file; it is the same number in all their checkpoints.
        options["mscale"] = options["mscale_all_dim"] = decimal(
            LOG_MULTIPLIERS[file.architecture] * decimal(multiplier)
        )
    if temperature := file.get("attention.temperature_scale"):
        options["llama_4_scaling_beta"] = decimal(temperature)
    if config["model_type"] == "gpt_oss":
        options["truncate"] = False  # no key says so; its checkpoints all do
    return options


def _long_scaling(file: GGUFHeader) -> dict[str, Any]:
    """Phi 3's: a factor for each frequency, for short and for long texts.

    The attention factor follows from the context lengths, for Hugging Face as in the files of its models.
    """
    original = int(file.need("rope.scaling.original_context_length"))
    scale = max(1.0, int(file.need("context_length")) / original)
    implied = math.sqrt(1 + math.log(scale) / math.log(original))
    if not math.isclose(file.get("rope.scaling.attn_factor", implied), implied, rel_tol=1e-3):
        raise UnsupportedError(f"{file.path}: its rope.scaling.attn_factor is not the {implied:.4f} of Phi 3's scaling")
    return {
        "rope_type": "longrope",
        "short_factor": [decimal(value) for value in file.read(ROPE_SHORT)],
        "long_factor": [decimal(value) for value in file.read(ROPE_LONG)],
        "original_max_position_embeddings": original,
    }


def _llama3_scaling(file: GGUFHeader, config: dict[str, Any]) -> dict[str, Any]:
    """Llama 3.1 and later keep what each frequency is divided by; the options behind it are found again."""
    factors = file.read(ROPE_FREQS)
    head_dim, original, factor = config["head_dim"], 8192, float(factors.max())
    inv_freq = config["rope_theta"] ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = original * inv_freq / (2 * np.pi)  # within the original context
    for low, high in ((1.0, 4.0), (1.0, 1.0)):  # Llama 3.1 to 3.3, Llama 4
        smooth = np.clip((turns - low) / (high - low), 0, 1) if high > low else (turns >= low).astype(np.float64)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if expected.shape == factors.shape and np.allclose(expected, factors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": decimal(factor),
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise UnsupportedError(f"{file.path}: its rope_freqs are not Llama 3.1's; open the original checkpoint instead")
