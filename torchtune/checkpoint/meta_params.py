"""Meta's `params.json` as a config.json; Mistral's first releases have the same form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchtune.checkpoint.folder import WeightFiles
from torchtune.checkpoint.headers import WeightSource, read_json
from torchtune.errors import CheckpointError, UnsupportedError

EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"
KNOWN = {
    *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "multiple_of", "ffn_dim_multiplier"),
    *("hidden_dim", "norm_eps", "rope_theta", "use_scaled_rope", "rope_scaling_factor", "sliding_window"),
    *("max_seq_len", "max_batch_size"),
}
# Rows of the embedding: first and last token of a text, which params.json does not tell.
SPECIAL_IDS = {32000: (1, 2), 32016: (1, 2), 128256: (128000, 128001)}


def config_from_params(path: Path, weights: WeightSource) -> dict[str, Any]:
    """The config.json that a params.json and the weights amount to.

    Args:
        weights: under Meta's names; without any, the config lacks what only they tell.
    Raises:
        CheckpointError: a key that it needs is absent.
        UnsupportedError: a key of another architecture; names it.
    """
    params = read_json(path)
    if unknown := sorted(set(params) - KNOWN):
        raise UnsupportedError(
            f"{path}: '{unknown[0]}' is not known of Llama; use the Hugging Face-layout files instead"
        )
    if missing := [key for key in ("dim", "n_layers", "n_heads") if key not in params]:
        raise CheckpointError(f"has no '{missing[0]}'", path=path)
    is_mistral = "hidden_dim" in params
    config = {
        "architectures": ["MistralForCausalLM" if is_mistral else "LlamaForCausalLM"],
        "model_type": "mistral" if is_mistral else "llama",
        "hidden_size": params["dim"],
        "intermediate_size": params.get("hidden_dim") or _intermediate_size(params),
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "head_dim": params.get("head_dim") or params["dim"] // params["n_heads"],
        "hidden_act": "silu",
        "max_position_embeddings": _context(params),
        "rms_norm_eps": params.get("norm_eps", 1e-5),
        "rope_theta": params.get("rope_theta", 10000.0),
    }
    if is_mistral:
        config["sliding_window"] = params.get("sliding_window")
    return config | _of_weights(params, weights)


def _of_weights(params: Mapping[str, Any], weights: WeightSource) -> dict[str, Any]:
    """What depends on the tensors."""
    found: dict[str, Any] = {}
    embedding = weights.headers.get(EMBEDDING)
    num_rows = embedding.shape[0] if embedding else params.get("vocab_size", -1)
    if num_rows > 0:
        found["vocab_size"] = num_rows
        found["bos_token_id"], found["eos_token_id"] = SPECIAL_IDS.get(num_rows, (None, None))
    is_tied = embedding is not None and _is_tied(weights)
    found["tie_word_embeddings"] = is_tied
    if embedding:
        found["torch_dtype"] = str(embedding.dtype).removeprefix("torch.")
    if params.get("use_scaled_rope"):
        found["rope_scaling"] = {
            "rope_type": "llama3",
            # Llama 3.2, whose heads alone are tied, scales by 32; 3.1 and 3.3 by 8. Older files don't say.
            "factor": float(params.get("rope_scaling_factor") or (32 if is_tied else 8)),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return found


def _is_tied(weights: WeightSource) -> bool:
    """Whether there is no head, or it is a copy of the embedding: Meta writes one in any case."""
    if HEAD not in weights.headers:
        return True
    # Tied models are small ones, of one file.
    return isinstance(weights, WeightFiles) and weights.are_equal(HEAD, EMBEDDING)


def _intermediate_size(params: Mapping[str, Any]) -> int:
    """Two thirds of four times the width, stretched, and rounded up to a multiple."""
    size = int(2 * 4 * params["dim"] / 3)
    if params.get("ffn_dim_multiplier") is not None:
        size = int(params["ffn_dim_multiplier"] * size)
    multiple = params.get("multiple_of", 256)
    return -(-size // multiple) * multiple


def _context(params: Mapping[str, Any]) -> int:
    """The positions that each release was trained for; params.json has them seldom."""
    if params.get("max_seq_len"):
        return int(params["max_seq_len"])
    if "hidden_dim" in params:
        return 32768
    if params.get("use_scaled_rope"):
        return 131072
    theta = params.get("rope_theta", 10000.0)
    if theta > 10000:
        return 16384 if theta >= 1e6 else 8192  # Code Llama, Llama 3
    return 2048 if params.get("norm_eps") == 1e-6 else 4096  # Llama 1, Llama 2
