"""The config.json of each GGUF architecture: which metadata key is which of the family's options.

What llama.cpp has fixed in its code and no file says (which layers have windows, whether weights of chosen experts
are normalised) is fixed here too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchtune.checkpoint.gguf import GGUFFile
from torchtune.errors import CheckpointError, UnsupportedError, did_you_mean

Config = dict[str, Any]
SOFTMAX, SIGMOID = 1, 2  # of `expert_gating_func`
GROUPED_EXPERTS = (160, 256)  # how many DeepSeek V2 and V3 have


@dataclass(frozen=True)
class Architecture:
    """A kind of model in GGUF files.

    Attributes:
        model_types: the families that its files can be of.
        config: what it says, from a file; with `model_type`.
    """

    model_types: tuple[str, ...]
    config: Callable[[GGUFFile], Config]


def decimal(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05, where the file holds 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def number(file: GGUFFile, key: str, default: int | None = None) -> int:
    """A whole number; given by layer, it is the same for all.

    Raises:
        UnsupportedError: it differs from layer to layer.
    """
    value = file.need(key) if default is None else file.get(key, default)
    values = set(value) if isinstance(value, list) else {value}
    if len(values) != 1:
        raise UnsupportedError(f"{file.path}: {file.architecture}.{key} differs from layer to layer: {value}")
    return int(values.pop())


def has(file: GGUFFile, name: str) -> bool:
    """Whether any layer has a tensor of this name."""
    return any(tensor.endswith(f".{name}") for tensor in file.tensors)


def shape(file: GGUFFile, name: str) -> tuple[int, ...]:
    """The shape of a tensor of a layer that has it.

    Raises:
        CheckpointError: none has.
    """
    for tensor in file.tensors.values():
        if tensor.name.endswith(f".{name}") or tensor.name == name:
            return tensor.shape
    raise CheckpointError(f"has no tensor '{name}'", path=file.path)


def _common(file: GGUFFile, model_type: str, model_class: str, *, eps: str = "rms_norm_eps") -> Config:
    """What nearly all have; the name of the norm's epsilon says which kind of norm it is, too."""
    kind = "_rms" if eps.startswith("rms") else ""
    hidden_size, num_heads = number(file, "embedding_length"), number(file, "attention.head_count")
    config: Config = {
        "architectures": [model_class],
        "model_type": model_type,
        "vocab_size": shape(file, "token_embd.weight")[0],
        "hidden_size": hidden_size,
        "intermediate_size": number(file, "feed_forward_length"),
        "num_hidden_layers": number(file, "block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": number(file, "attention.head_count_kv", num_heads),
        "head_dim": number(file, "attention.key_length", hidden_size // num_heads),
        "hidden_act": "silu",
        "max_position_embeddings": number(file, "context_length"),
        eps: decimal(file.need(f"attention.layer_norm{kind}_epsilon")),
        "rope_theta": decimal(file.get("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if file.get("attention.value_length", config["head_dim"]) != config["head_dim"]:
        raise UnsupportedError(f"{file.path}: keys and values of different lengths are not supported here")
    return config


def _partial_rotary(file: GGUFFile, config: Config) -> float:
    """The share of a head that is rotated."""
    return float(file.get("rope.dimension_count", config["head_dim"])) / float(config["head_dim"])


def _windows(file: GGUFFile, config: Config, *, every: int) -> Config:
    """A window on all layers but each `every`-th, unless the file has a pattern of its own."""
    pattern = file.get("attention.sliding_window_pattern", every)
    num_layers = config["num_hidden_layers"]
    if isinstance(pattern, list):
        windowed = [bool(value) for value in pattern[:num_layers]]
    else:
        windowed = [(layer + 1) % int(pattern) != 0 for layer in range(num_layers)]
    return {
        "sliding_window": number(file, "attention.sliding_window"),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windowed],
    }


def _biases(file: GGUFFile) -> Config:
    return {"attention_bias": has(file, "attn_q.bias"), "mlp_bias": has(file, "ffn_up.bias")}


def _llama(file: GGUFFile) -> Config:
    if not file.get("expert_count"):
        return {**_common(file, "llama", "LlamaForCausalLM"), **_biases(file)}
    return {
        **_common(file, "mixtral", "MixtralForCausalLM"),
        "num_local_experts": number(file, "expert_count"),
        "num_experts_per_tok": number(file, "expert_used_count"),
        "sliding_window": None,
    }


def _qwen2(file: GGUFFile) -> Config:
    return _common(file, "qwen2", "Qwen2ForCausalLM")


def _qwen3(file: GGUFFile) -> Config:
    return {**_common(file, "qwen3", "Qwen3ForCausalLM"), "attention_bias": has(file, "attn_q.bias")}


def _experts(file: GGUFFile, num_experts: str, *, normalised: bool) -> Config:
    return {
        num_experts: number(file, "expert_count"),
        "num_experts_per_tok": number(file, "expert_used_count"),
        "norm_topk_prob": bool(file.get("expert_weights_norm", normalised)),
    }


def _qwen2_moe(file: GGUFFile) -> Config:
    return {
        **_common(file, "qwen2_moe", "Qwen2MoeForCausalLM"),
        **_experts(file, "num_experts", normalised=False),
        "moe_intermediate_size": shape(file, "ffn_down_exps.weight")[-1],
        "shared_expert_intermediate_size": shape(file, "ffn_down_shexp.weight")[-1],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen3_moe(file: GGUFFile) -> Config:
    return {
        **_common(file, "qwen3_moe", "Qwen3MoeForCausalLM"),
        **_experts(file, "num_experts", normalised=True),
        "moe_intermediate_size": shape(file, "ffn_down_exps.weight")[-1],
        "attention_bias": has(file, "attn_q.bias"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gemma(file: GGUFFile) -> Config:
    config = _common(file, "gemma", "GemmaForCausalLM")
    return {**config, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def _gemma_scale(config: Config, layers_of_largest: int) -> int:
    """What scores are divided by the root of: the largest model's is its hidden size by head, others' head_dim."""
    if config["num_hidden_layers"] == layers_of_largest:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _soft_cap(file: GGUFFile, key: str) -> float | None:
    value = file.get(key)
    return decimal(value) if value else None


def _gemma2(file: GGUFFile) -> Config:
    config = _common(file, "gemma2", "Gemma2ForCausalLM")
    del config["hidden_act"]
    return {
        **config,
        **_windows(file, config, every=2),
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _gemma_scale(config, 46),
        "attn_logit_softcapping": _soft_cap(file, "attn_logit_softcapping"),
        "final_logit_softcapping": _soft_cap(file, "final_logit_softcapping"),
    }


def _gemma3(file: GGUFFile) -> Config:
    config = _common(file, "gemma3_text", "Gemma3ForCausalLM")
    del config["hidden_act"]
    return {
        **config,
        **_windows(file, config, every=6),
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _gemma_scale(config, 62),
        "rope_local_base_freq": decimal(file.get("rope.freq_base_swa", 10000.0)),
        "attn_logit_softcapping": _soft_cap(file, "attn_logit_softcapping"),
        "final_logit_softcapping": _soft_cap(file, "final_logit_softcapping"),
    }


def _phi3(file: GGUFFile) -> Config:
    config = _common(file, "phi3", "Phi3ForCausalLM")
    original = file.get("rope.scaling.original_context_length")
    return {
        **config,
        **({"original_max_position_embeddings": original} if original else {}),
        "partial_rotary_factor": _partial_rotary(file, config),
        "sliding_window": file.get("attention.sliding_window") or None,
    }


def _starcoder2(file: GGUFFile) -> Config:
    return {
        **_common(file, "starcoder2", "Starcoder2ForCausalLM", eps="norm_epsilon"),
        "hidden_act": "gelu_pytorch_tanh",
        "use_bias": has(file, "attn_q.bias"),
        "sliding_window": file.get("attention.sliding_window") or None,
    }


def _stablelm(file: GGUFFile) -> Config:
    config = _common(file, "stablelm", "StableLmForCausalLM", eps="layer_norm_eps")
    return {
        **config,
        "use_qkv_bias": has(file, "attn_q.bias"),
        "qk_layernorm": has(file, "attn_q_norm.weight"),
        "use_parallel_residual": not has(file, "ffn_norm.weight"),
        "partial_rotary_factor": _partial_rotary(file, config),
    }


def _gpt2(file: GGUFFile) -> Config:
    positions = number(file, "context_length")
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": shape(file, "token_embd.weight")[0],
        "n_embd": number(file, "embedding_length"),
        "n_layer": number(file, "block_count"),
        "n_head": number(file, "attention.head_count"),
        "n_inner": number(file, "feed_forward_length"),
        "n_positions": positions,
        "n_ctx": positions,
        "layer_norm_epsilon": decimal(file.need("attention.layer_norm_epsilon")),
        "activation_function": "gelu_new",
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }


def _gpt_neox(file: GGUFFile) -> Config:
    config = _common(file, "gpt_neox", "GPTNeoXForCausalLM", eps="layer_norm_eps")
    del config["num_key_value_heads"]
    return {
        **config,
        "hidden_act": "gelu",
        "rotary_pct": _partial_rotary(file, config),
        "rotary_emb_base": config["rope_theta"],
        "use_parallel_residual": bool(file.get("use_parallel_residual", True)),
        "attention_bias": has(file, "attn_qkv.bias"),
    }


def _phi(file: GGUFFile) -> Config:
    config = _common(file, "phi", "PhiForCausalLM", eps="layer_norm_eps")
    return {**config, "hidden_act": "gelu_new", "partial_rotary_factor": _partial_rotary(file, config)}


def _multipliers(file: GGUFFile, config: Config) -> Config:
    """Granite's four factors; scores are scaled as everywhere where the file has no factor for them."""
    return {
        "attention_multiplier": decimal(file.get("attention.scale") or config["head_dim"] ** -0.5),
        "embedding_multiplier": decimal(file.get("embedding_scale") or 1.0),
        "residual_multiplier": decimal(file.get("residual_scale") or 1.0),
        "logits_scaling": decimal(file.get("logit_scale") or 1.0),
    }


def _granite(file: GGUFFile) -> Config:
    config = _common(file, "granite", "GraniteForCausalLM")
    return {**config, **_biases(file), **_multipliers(file, config)}


def _granite_moe(file: GGUFFile) -> Config:
    is_shared = has(file, "ffn_down_shexp.weight")
    model_type, model_class = (
        ("granitemoeshared", "GraniteMoeSharedForCausalLM") if is_shared else ("granitemoe", "GraniteMoeForCausalLM")
    )
    config = _common(file, model_type, model_class)
    config |= {
        **_multipliers(file, config),
        "intermediate_size": shape(file, "ffn_down_exps.weight")[-1],
        "num_local_experts": number(file, "expert_count"),
        "num_experts_per_tok": number(file, "expert_used_count"),
        "attention_bias": has(file, "attn_q.bias"),
    }
    if is_shared:
        config["shared_intermediate_size"] = shape(file, "ffn_down_shexp.weight")[-1]
    return config


def _olmo2(file: GGUFFile) -> Config:
    if file.get("attention.sliding_window") is None:
        return {**_common(file, "olmo2", "Olmo2ForCausalLM"), "attention_bias": has(file, "attn_q.bias")}
    config = {**_common(file, "olmo3", "Olmo3ForCausalLM"), "attention_bias": has(file, "attn_q.bias")}
    return {**config, **_windows(file, config, every=4)}


def _olmoe(file: GGUFFile) -> Config:
    config = _common(file, "olmoe", "OlmoeForCausalLM")
    return {
        **config,
        **_experts(file, "num_experts", normalised=False),
        "intermediate_size": shape(file, "ffn_down_exps.weight")[-1],
        "attention_bias": has(file, "attn_q.bias"),
        "clip_qkv": None,
    }


def _cohere(file: GGUFFile) -> Config:
    return {
        **_common(file, "cohere", "CohereForCausalLM", eps="layer_norm_eps"),
        "logit_scale": decimal(file.need("logit_scale")),
        "use_qk_norm": has(file, "attn_q_norm.weight"),
        "attention_bias": has(file, "attn_q.bias"),
    }


def _cohere2(file: GGUFFile) -> Config:
    config = _common(file, "cohere2", "Cohere2ForCausalLM", eps="layer_norm_eps")
    return {
        **config,
        **_windows(file, config, every=4),
        "logit_scale": decimal(file.need("logit_scale")),
        "attention_bias": has(file, "attn_q.bias"),
    }


def _glm(file: GGUFFile, model_type: str, model_class: str) -> Config:
    config = _common(file, model_type, model_class)
    return {
        **config,
        "partial_rotary_factor": _partial_rotary(file, config),
        "attention_bias": has(file, "attn_q.bias"),
    }


def _glm4(file: GGUFFile) -> Config:
    return _glm(file, "glm4", "Glm4ForCausalLM")


def _chatglm(file: GGUFFile) -> Config:
    return _glm(file, "glm", "GlmForCausalLM")


def _smollm3(file: GGUFFile) -> Config:
    config = _common(file, "smollm3", "SmolLM3ForCausalLM")
    return {
        **config,
        **_biases(file),
        "no_rope_layer_interval": 4,
        "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(config["num_hidden_layers"])],
        "use_sliding_window": False,
        "sliding_window": None,
    }


def _mistral3(file: GGUFFile) -> Config:
    if file.get("expert_count"):
        raise UnsupportedError(f"{file.path}: 'mistral3' with experts is not supported")
    return {**_common(file, "ministral3", "Ministral3ForCausalLM"), "sliding_window": None}


def _llama4(file: GGUFFile) -> Config:
    config = _common(file, "llama4_text", "Llama4ForCausalLM")
    num_layers = config["num_hidden_layers"]
    step = number(file, "interleave_moe_layer_step")
    rotated = [int((layer + 1) % 4 != 0) for layer in range(num_layers)]
    return {
        **config,
        "intermediate_size": number(file, "expert_feed_forward_length"),
        "intermediate_size_mlp": config["intermediate_size"],
        "num_local_experts": number(file, "expert_count"),
        "num_experts_per_tok": number(file, "expert_used_count"),
        "interleave_moe_layer_step": step,
        "moe_layers": list(range(step - 1, num_layers, step)) if step else [],
        # The 128 experts of Maverick's layers come without norms on queries and keys.
        "use_qk_norm": number(file, "expert_count") != 128,
        "no_rope_layers": rotated,
        "layer_types": ["chunked_attention" if rope else "full_attention" for rope in rotated],
        "attention_chunk_size": int(file.get("attention.chunk_size", 8192)),
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
        "attention_bias": False,
    }


def _deepseek(file: GGUFFile) -> Config:
    is_v3 = has(file, "exp_probs_b.bias")
    if is_v3 != (file.get("expert_gating_func", SOFTMAX) == SIGMOID):
        raise UnsupportedError(
            f"{file.path}: a sigmoid router without exp_probs_b, or the reverse, is no DeepSeek V2 or V3"
        )
    model_type, model_class = (
        ("deepseek_v3", "DeepseekV3ForCausalLM") if is_v3 else ("deepseek_v2", "DeepseekV2ForCausalLM")
    )
    # Files that keep the expansion of keys and values apart write the lengths of the compressed ones under the
    # usual names, and these under others.
    key_length = int(file.get("attention.key_length_mla") or number(file, "attention.key_length"))
    value_length = int(file.get("attention.value_length_mla") or number(file, "attention.value_length"))
    rope_dim = number(file, "rope.dimension_count")
    num_heads = number(file, "attention.head_count")
    num_groups = file.get("expert_group_count")
    if num_groups is None and number(file, "expert_count") in GROUPED_EXPERTS:
        raise UnsupportedError(
            f"{file.path}: its experts are chosen by groups, but it is of a time when converters did not write "
            "expert_group_count; convert the original checkpoint anew, or open that"
        )
    config: Config = {
        "architectures": [model_class],
        "model_type": model_type,
        "vocab_size": shape(file, "token_embd.weight")[0],
        "hidden_size": number(file, "embedding_length"),
        "intermediate_size": number(file, "feed_forward_length"),
        "num_hidden_layers": number(file, "block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "max_position_embeddings": number(file, "context_length"),
        "rms_norm_eps": decimal(file.need("attention.layer_norm_rms_epsilon")),
        "rope_theta": decimal(file.get("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
        "attention_bias": False,
        "q_lora_rank": file.get("attention.q_lora_rank") if has(file, "attn_q_a.weight") else None,
        "kv_lora_rank": number(file, "attention.kv_lora_rank"),
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": key_length - rope_dim,
        "v_head_dim": value_length,
        "first_k_dense_replace": int(file.get("leading_dense_block_count", 0)),
        "moe_layer_freq": 1,
        "moe_intermediate_size": shape(file, "ffn_down_exps.weight")[-1],
        "n_routed_experts": number(file, "expert_count"),
        "n_shared_experts": number(file, "expert_shared_count"),
        "num_experts_per_tok": number(file, "expert_used_count"),
        "routed_scaling_factor": decimal(file.get("expert_weights_scale") or 1.0),
        "norm_topk_prob": bool(file.get("expert_weights_norm", False)),
        "n_group": num_groups if num_groups or not is_v3 else 1,
        "topk_group": file.get("expert_group_used_count") if num_groups or not is_v3 else 1,
        "scoring_func": "sigmoid" if is_v3 else "softmax",
        "topk_method": "noaux_tc" if is_v3 else "group_limited_greedy" if num_groups else "greedy",
    }
    return config


def _gpt_oss(file: GGUFFile) -> Config:
    config = _common(file, "gpt_oss", "GptOssForCausalLM")
    return {
        **config,
        **_windows(file, config, every=2),
        "intermediate_size": shape(file, "ffn_down_exps.weight")[-1],
        "num_local_experts": number(file, "expert_count"),
        "num_experts_per_tok": number(file, "expert_used_count"),
        "attention_bias": True,
        "swiglu_limit": 7.0,
    }


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(("llama", "mixtral"), _llama),
    "llama4": Architecture(("llama4_text",), _llama4),
    "mistral3": Architecture(("ministral3",), _mistral3),
    "qwen2": Architecture(("qwen2",), _qwen2),
    "qwen3": Architecture(("qwen3",), _qwen3),
    "qwen2moe": Architecture(("qwen2_moe",), _qwen2_moe),
    "qwen3moe": Architecture(("qwen3_moe",), _qwen3_moe),
    "gemma": Architecture(("gemma",), _gemma),
    "gemma2": Architecture(("gemma2",), _gemma2),
    "gemma3": Architecture(("gemma3_text",), _gemma3),
    "phi2": Architecture(("phi",), _phi),
    "phi3": Architecture(("phi3",), _phi3),
    "starcoder2": Architecture(("starcoder2",), _starcoder2),
    "stablelm": Architecture(("stablelm",), _stablelm),
    "gpt2": Architecture(("gpt2",), _gpt2),
    "gptneox": Architecture(("gpt_neox",), _gpt_neox),
    "granite": Architecture(("granite",), _granite),
    "granitemoe": Architecture(("granitemoe", "granitemoeshared"), _granite_moe),
    "olmo2": Architecture(("olmo2", "olmo3"), _olmo2),
    "olmoe": Architecture(("olmoe",), _olmoe),
    "command-r": Architecture(("cohere",), _cohere),
    "cohere2": Architecture(("cohere2",), _cohere2),
    "glm4": Architecture(("glm4",), _glm4),
    "chatglm": Architecture(("glm",), _chatglm),
    "smollm3": Architecture(("smollm3",), _smollm3),
    "deepseek2": Architecture(("deepseek_v2", "deepseek_v3"), _deepseek),
    "gpt-oss": Architecture(("gpt_oss",), _gpt_oss),
}
# Families that a GGUF file can be of.
MODEL_TYPES = {name for architecture in ARCHITECTURES.values() for name in architecture.model_types}


def find_architecture(file: GGUFFile) -> Architecture:
    """What is known of a file's architecture.

    Raises:
        UnsupportedError: nothing; names the nearest.
    """
    if file.architecture not in ARCHITECTURES:
        raise UnsupportedError(
            f"{file.path}: GGUF architecture '{file.architecture}' is not supported"
            f"{did_you_mean(file.architecture, ARCHITECTURES)}"
        )
    return ARCHITECTURES[file.architecture]
