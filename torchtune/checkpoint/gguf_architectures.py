"""The config.json of each GGUF architecture: which metadata key is which of the family's options.

What llama.cpp has fixed in its code and no file says (which layers have windows, whether weights of chosen experts
are normalised) is fixed here too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torchtune.checkpoint.gguf import GGUFHeader
from torchtune.checkpoint.gguf_keys import (
    Config,
    biases,
    common,
    decimal,
    has,
    number,
    partial_rotary,
    shape,
    soft_cap,
    windows,
)
from torchtune.checkpoint.gguf_mixtures import (
    deepseek,
    glm4_moe,
    gpt_oss,
    granite_moe,
    llama4,
    mixtral,
    multipliers,
    olmoe,
    qwen2_moe,
    qwen3_moe,
)
from torchtune.errors import UnsupportedError, did_you_mean


@dataclass(frozen=True)
class Architecture:
    """A kind of model in GGUF files.

    Attributes:
        model_types: the families that its files can be of.
        config: what it says, from a file; with `model_type`.
    """

    model_types: tuple[str, ...]
    config: Callable[[GGUFHeader], Config]


def _llama(file: GGUFHeader) -> Config:
    if file.get("expert_count"):
        return mixtral(file)
    return {**common(file, "llama", "LlamaForCausalLM"), **biases(file)}


def _qwen2(file: GGUFHeader) -> Config:
    return common(file, "qwen2", "Qwen2ForCausalLM")


def _qwen3(file: GGUFHeader) -> Config:
    return {**common(file, "qwen3", "Qwen3ForCausalLM"), "attention_bias": has(file, "attn_q.bias")}


def _gemma(file: GGUFHeader) -> Config:
    config = common(file, "gemma", "GemmaForCausalLM")
    return {**config, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def _gemma_scale(config: Config, layers_of_largest: int) -> int:
    """What scores are divided by the root of: the largest model's is its hidden size by head, others' head_dim."""
    if config["num_hidden_layers"] == layers_of_largest:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _gemma2(file: GGUFHeader) -> Config:
    config = common(file, "gemma2", "Gemma2ForCausalLM")
    del config["hidden_act"]
    return {
        **config,
        **windows(file, config, every=2),
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _gemma_scale(config, 46),
        "attn_logit_softcapping": soft_cap(file, "attn_logit_softcapping"),
        "final_logit_softcapping": soft_cap(file, "final_logit_softcapping"),
    }


def _gemma3(file: GGUFHeader) -> Config:
    config = common(file, "gemma3_text", "Gemma3ForCausalLM")
    del config["hidden_act"]
    return {
        **config,
        **windows(file, config, every=6),
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _gemma_scale(config, 62),
        "rope_local_base_freq": decimal(file.get("rope.freq_base_swa", 10000.0)),
        "attn_logit_softcapping": soft_cap(file, "attn_logit_softcapping"),
        "final_logit_softcapping": soft_cap(file, "final_logit_softcapping"),
    }


def _phi3(file: GGUFHeader) -> Config:
    config = common(file, "phi3", "Phi3ForCausalLM")
    original = file.get("rope.scaling.original_context_length")
    return {
        **config,
        **({"original_max_position_embeddings": original} if original else {}),
        "partial_rotary_factor": partial_rotary(file, config),
        "sliding_window": file.get("attention.sliding_window") or None,
    }


def _starcoder2(file: GGUFHeader) -> Config:
    return {
        **common(file, "starcoder2", "Starcoder2ForCausalLM", eps="norm_epsilon"),
        "hidden_act": "gelu_pytorch_tanh",
        "use_bias": has(file, "attn_q.bias"),
        "sliding_window": file.get("attention.sliding_window") or None,
    }


def _stablelm(file: GGUFHeader) -> Config:
    config = common(file, "stablelm", "StableLmForCausalLM", eps="layer_norm_eps")
    return {
        **config,
        "use_qkv_bias": has(file, "attn_q.bias"),
        "qk_layernorm": has(file, "attn_q_norm.weight"),
        "use_parallel_residual": not has(file, "ffn_norm.weight"),
        "partial_rotary_factor": partial_rotary(file, config),
    }


def _gpt2(file: GGUFHeader) -> Config:
    positions, width = number(file, "context_length"), number(file, "embedding_length")
    inner = number(file, "feed_forward_length")
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": shape(file, "token_embd.weight")[0],
        "n_embd": width,
        "n_layer": number(file, "block_count"),
        "n_head": number(file, "attention.head_count"),
        "n_inner": None if inner == 4 * width else inner,
        "n_positions": positions,
        "n_ctx": positions,
        "layer_norm_epsilon": decimal(file.need("attention.layer_norm_epsilon")),
        "activation_function": "gelu_new",
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }


def _gpt_neox(file: GGUFHeader) -> Config:
    config = common(file, "gpt_neox", "GPTNeoXForCausalLM", eps="layer_norm_eps")
    del config["num_key_value_heads"]
    return {
        **config,
        "hidden_act": "gelu",
        "rotary_pct": partial_rotary(file, config),
        "rotary_emb_base": config["rope_theta"],
        "use_parallel_residual": bool(file.get("use_parallel_residual", True)),
        "attention_bias": has(file, "attn_qkv.bias"),
    }


def _phi(file: GGUFHeader) -> Config:
    config = common(file, "phi", "PhiForCausalLM", eps="layer_norm_eps")
    return {**config, "hidden_act": "gelu_new", "partial_rotary_factor": partial_rotary(file, config)}


def _granite(file: GGUFHeader) -> Config:
    config = common(file, "granite", "GraniteForCausalLM")
    return {**config, **biases(file), **multipliers(file, config)}


def _olmo2(file: GGUFHeader) -> Config:
    if file.get("attention.sliding_window") is None:
        return {**common(file, "olmo2", "Olmo2ForCausalLM"), "attention_bias": has(file, "attn_q.bias")}
    config = {**common(file, "olmo3", "Olmo3ForCausalLM"), "attention_bias": has(file, "attn_q.bias")}
    return {**config, **windows(file, config, every=4)}


def _cohere(file: GGUFHeader) -> Config:
    return {
        **common(file, "cohere", "CohereForCausalLM", eps="layer_norm_eps"),
        "logit_scale": decimal(file.need("logit_scale")),
        "use_qk_norm": has(file, "attn_q_norm.weight"),
        "attention_bias": has(file, "attn_q.bias"),
    }


def _cohere2(file: GGUFHeader) -> Config:
    config = common(file, "cohere2", "Cohere2ForCausalLM", eps="layer_norm_eps")
    return {
        **config,
        **windows(file, config, every=4),
        "logit_scale": decimal(file.need("logit_scale")),
        "attention_bias": has(file, "attn_q.bias"),
    }


def _glm(file: GGUFHeader, model_type: str, model_class: str) -> Config:
    config = common(file, model_type, model_class)
    return {
        **config,
        "partial_rotary_factor": partial_rotary(file, config),
        "attention_bias": has(file, "attn_q.bias"),
    }


def _glm4(file: GGUFHeader) -> Config:
    return _glm(file, "glm4", "Glm4ForCausalLM")


def _chatglm(file: GGUFHeader) -> Config:
    return _glm(file, "glm", "GlmForCausalLM")


def _smollm3(file: GGUFHeader) -> Config:
    config = common(file, "smollm3", "SmolLM3ForCausalLM")
    return {
        **config,
        **biases(file),
        "no_rope_layer_interval": 4,
        "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(config["num_hidden_layers"])],
        "use_sliding_window": False,
        "sliding_window": None,
    }


def _mistral3(file: GGUFHeader) -> Config:
    if file.get("expert_count"):
        raise UnsupportedError(f"{file.path}: 'mistral3' with experts is not supported")
    return {**common(file, "ministral3", "Ministral3ForCausalLM"), "sliding_window": None}


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(("llama", "mixtral"), _llama),
    "llama4": Architecture(("llama4_text",), llama4),
    "mistral3": Architecture(("ministral3",), _mistral3),
    "qwen2": Architecture(("qwen2",), _qwen2),
    "qwen3": Architecture(("qwen3",), _qwen3),
    "qwen2moe": Architecture(("qwen2_moe",), qwen2_moe),
    "qwen3moe": Architecture(("qwen3_moe",), qwen3_moe),
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
    "granitemoe": Architecture(("granitemoe", "granitemoeshared"), granite_moe),
    "olmo2": Architecture(("olmo2", "olmo3"), _olmo2),
    "olmoe": Architecture(("olmoe",), olmoe),
    "command-r": Architecture(("cohere",), _cohere),
    "cohere2": Architecture(("cohere2",), _cohere2),
    "glm4": Architecture(("glm4",), _glm4),
    "glm4moe": Architecture(("glm4_moe",), glm4_moe),
    "chatglm": Architecture(("glm",), _chatglm),
    "smollm3": Architecture(("smollm3",), _smollm3),
    "deepseek2": Architecture(("deepseek_v2", "deepseek_v3"), deepseek),
    "gpt-oss": Architecture(("gpt_oss",), gpt_oss),
}
# Families that a GGUF file can be of.
MODEL_TYPES = {name for architecture in ARCHITECTURES.values() for name in architecture.model_types}


def find_architecture(file: GGUFHeader) -> Architecture:
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
