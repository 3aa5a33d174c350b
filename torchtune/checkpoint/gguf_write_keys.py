"""The metadata of a GGUF file's model: the inverse of gguf_architectures.py, from a config.json to keys.

A family has the keys that llama.cpp reads for it and no others. What it has fixed in its code is not said, and
gguf_write_proof.py refuses a config that differs there. Keys are written without the architecture before them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torchtune.checkpoint.gguf_mixtures import GROUPED_EXPERTS, SIGMOID, SOFTMAX
from torchtune.errors import UnsupportedError, did_you_mean
from torchtune.models.build import FILES
from torchtune.models.config import HFConfig
from torchtune.models.gpt2 import KEYS as GPT2_KEYS
from torchtune.models.mixtures import num_experts
from torchtune.models.phi3 import OLD_NAMES

Keys = dict[str, Any]
RMS, LAYER, STARCODER = "rms_norm_eps", "layer_norm_eps", "norm_epsilon"


@dataclass(frozen=True)
class Family:
    """How a model_type is written.

    Attributes:
        architecture: as llama.cpp calls it.
        more: keys beside those that nearly all have.
        eps: the config's name for the epsilon of its norms.
    """

    architecture: str
    more: Callable[[HFConfig], Keys] = lambda config: {}
    eps: str = RMS


def text_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the text alone, where the model sees besides."""
    kind = str(values.get("model_type"))
    if kind not in SEEING:
        return dict(values)
    text = {"model_type": SEEING[kind], **(values.get("text_config") or {})}
    if kind == "gemma3":
        # transformers caps the logits of the text model alone.
        return {**text, "tie_word_embeddings": values.get("tie_word_embeddings", True), "final_logit_softcapping": None}
    if kind == "mistral3":
        return {
            **text,
            "tie_word_embeddings": values.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
        }
    return text


def find_written(values: Mapping[str, Any]) -> Family:
    """How a config's family is written.

    Raises:
        UnsupportedError: it can't be; names the nearest.
    """
    model_type = str(values.get("model_type"))
    if model_type not in WRITTEN:
        raise UnsupportedError(
            f"model_type '{model_type}' can't be written to a GGUF file{did_you_mean(model_type, WRITTEN)}; "
            "export it with format=safetensors"
        )
    return WRITTEN[model_type]


def with_defaults(values: Mapping[str, Any]) -> HFConfig:
    """A config with what its family assumes for absent keys, under the usual names."""
    model_type = str(values["model_type"])
    known = {**import_module(f"torchtune.models.{FILES[model_type]}").DEFAULTS, **values}
    if model_type == "gpt2":
        known = {**{usual: known[key] for usual, key in GPT2_KEYS.items()}, **known}
        known["intermediate_size"] = known["n_inner"] or 4 * known["hidden_size"]
        known["layer_norm_eps"] = known["layer_norm_epsilon"]
    if model_type == "gpt_neox":
        known |= {"rope_theta": known["rotary_emb_base"], "partial_rotary_factor": known["rotary_pct"]}
        known |= {"num_key_value_heads": None}
    if model_type in ("gpt_neox", "stablelm"):
        known["head_dim"] = None  # always hidden_size over heads
    return HFConfig(known)


def rope_options(config: HFConfig) -> dict[str, Any]:
    """The rotary options of the layers that see all, in the newer spelling."""
    given = config.get("rope_parameters") or {}
    by_type = any(isinstance(options, Mapping) for options in given.values())
    rope = config.rope_parameters_of("full_attention") if by_type else config.rope_parameters
    if config.model_type == "olmo3":
        rope |= config.get("rope_scaling") or {}
    if config.model_type == "phi3" and rope["rope_type"] in OLD_NAMES:
        rope["rope_type"] = "longrope"
    return rope


def model_keys(values: Mapping[str, Any]) -> Keys:
    """The keys of a model's sizes and options; those of rotary scaling are in gguf_write_rope.py."""
    family, config = find_written(values), with_defaults(values)
    keys = {**_common(config, family.eps), **family.more(config)}
    return {key: value for key, value in keys.items() if value is not None}


def _common(config: HFConfig, eps: str) -> Keys:
    kind = "_rms" if eps == RMS else ""
    rope = rope_options(config)
    return {
        "vocab_size": config.vocab_size,
        "context_length": int(config.max_position_embeddings),
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": int(config.intermediate_size),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        f"attention.layer_norm{kind}_epsilon": float(config.get(eps)),
        "rope.dimension_count": int(config.head_dim * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
    }


def _cap(value: Any) -> float | None:
    return float(value) if value else None


def _window(config: HFConfig) -> Keys:
    window = config.get("sliding_window")
    return {"attention.sliding_window": int(window) if window else None}


def _experts(config: HFConfig) -> Keys:
    return {"expert_count": num_experts(config), "expert_used_count": int(config.num_experts_per_tok)}


def _small_experts(config: HFConfig) -> Keys:
    return {**_experts(config), "expert_feed_forward_length": int(config.moe_intermediate_size)}


def _qwen2_moe(config: HFConfig) -> Keys:
    shared = int(config.shared_expert_intermediate_size)
    return {**_small_experts(config), "expert_shared_feed_forward_length": shared}


def _gemma2(config: HFConfig) -> Keys:
    return {
        **_window(config),
        "attn_logit_softcapping": _cap(config.get("attn_logit_softcapping")),
        "final_logit_softcapping": _cap(config.get("final_logit_softcapping")),
    }


def _gemma3(config: HFConfig) -> Keys:
    local = config.rope_parameters_of("sliding_attention", rope_theta=config.get("rope_local_base_freq"))
    return {
        **_window(config),
        "rope.freq_base_swa": float(local["rope_theta"]),
        "final_logit_softcapping": _cap(config.get("final_logit_softcapping")),
    }


def _parallel(config: HFConfig) -> Keys:
    return {"use_parallel_residual": bool(config.use_parallel_residual)}


def _gpt2(config: HFConfig) -> Keys:
    no_rotary = ("rope.dimension_count", "rope.freq_base", "attention.head_count_kv")
    return dict.fromkeys((*no_rotary, "attention.key_length", "attention.value_length"))


def _multipliers(config: HFConfig) -> Keys:
    return {
        "attention.scale": float(config.attention_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


def _granite_moe(config: HFConfig) -> Keys:
    shared = config.get("shared_intermediate_size") if config.model_type == "granitemoeshared" else None
    return {**_multipliers(config), **_experts(config), "expert_shared_feed_forward_length": shared or None}


def _cohere(config: HFConfig) -> Keys:
    return {"logit_scale": float(config.logit_scale)}


def _cohere2(config: HFConfig) -> Keys:
    return {**_cohere(config), **_window(config)}


def _routed(config: HFConfig, *, gating: int) -> Keys:
    """What DeepSeek's kind of router has; GLM-4.5 has it too."""
    return {
        **_small_experts(config),
        "leading_dense_block_count": int(config.first_k_dense_replace),
        "expert_shared_count": int(config.n_shared_experts),
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": bool(config.norm_topk_prob),
        "expert_gating_func": gating,
    }


def _groups(config: HFConfig) -> Keys:
    return {"expert_group_count": int(config.n_group), "expert_group_used_count": int(config.topk_group)}


def _glm4_moe(config: HFConfig) -> Keys:
    return {**_routed(config, gating=SIGMOID), **_groups(config)}


def _latent(config: HFConfig) -> Keys:
    """DeepSeek's attention: what is cached has one head; the heads' own sizes have keys of their own."""
    key_length = int(config.qk_nope_head_dim + config.qk_rope_head_dim)
    return {
        "attention.q_lora_rank": config.get("q_lora_rank"),
        "attention.kv_lora_rank": int(config.kv_lora_rank),
        "attention.head_count_kv": 1,
        "attention.key_length": int(config.kv_lora_rank + config.qk_rope_head_dim),
        "attention.value_length": int(config.kv_lora_rank),
        "attention.key_length_mla": key_length,
        "attention.value_length_mla": int(config.v_head_dim),
        "rope.dimension_count": int(config.qk_rope_head_dim),
    }


def _deepseek_v2(config: HFConfig) -> Keys:
    groups: Keys = {}
    if config.topk_method == "group_limited_greedy":
        groups = _groups(config)
    elif num_experts(config) in GROUPED_EXPERTS:
        # Readers take so many for grouped where no key says otherwise; among all is within the one group of one.
        groups = {"expert_group_count": 1, "expert_group_used_count": 1}
    return {**_latent(config), **_routed(config, gating=SOFTMAX), **groups}


def _deepseek_v3(config: HFConfig) -> Keys:
    return {**_latent(config), **_routed(config, gating=SIGMOID), **_groups(config)}


def _gpt_oss(config: HFConfig) -> Keys:
    return {**_experts(config), **_window(config), "expert_feed_forward_length": int(config.intermediate_size)}


def _llama4(config: HFConfig) -> Keys:
    return {
        **_experts(config),
        "feed_forward_length": int(config.intermediate_size_mlp),
        "expert_feed_forward_length": int(config.intermediate_size),
        "interleave_moe_layer_step": int(config.interleave_moe_layer_step),
    }


WRITTEN = {
    "llama": Family("llama"),
    "mistral": Family("llama"),
    "mixtral": Family("llama", _experts),
    "llama4_text": Family("llama4", _llama4),
    "ministral3": Family("mistral3"),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "qwen2_moe": Family("qwen2moe", _qwen2_moe),
    "qwen3_moe": Family("qwen3moe", _small_experts),
    "gemma": Family("gemma"),
    "gemma2": Family("gemma2", _gemma2),
    "gemma3_text": Family("gemma3", _gemma3),
    "phi": Family("phi2", eps=LAYER),
    "phi3": Family("phi3", _window),
    "starcoder2": Family("starcoder2", _window, eps=STARCODER),
    "stablelm": Family("stablelm", _parallel, eps=LAYER),
    "gpt2": Family("gpt2", _gpt2, eps=LAYER),
    "gpt_neox": Family("gptneox", _parallel, eps=LAYER),
    "granite": Family("granite", _multipliers),
    "granitemoe": Family("granitemoe", _granite_moe),
    "granitemoeshared": Family("granitemoe", _granite_moe),
    "olmo2": Family("olmo2"),
    "olmo3": Family("olmo2", _window),
    "olmoe": Family("olmoe", _experts),
    "cohere": Family("command-r", _cohere, eps=LAYER),
    "cohere2": Family("cohere2", _cohere2, eps=LAYER),
    "glm": Family("chatglm"),
    "glm4": Family("glm4"),
    "glm4_moe": Family("glm4moe", _glm4_moe),
    "smollm3": Family("smollm3"),
    "deepseek_v2": Family("deepseek2", _deepseek_v2),
    "deepseek_v3": Family("deepseek2", _deepseek_v3),
    "gpt_oss": Family("gpt-oss", _gpt_oss),
}
# Models that see, and the kind of their text where they don't say it.
SEEING = {"gemma3": "gemma3_text", "llama4": "llama4_text", "mistral3": "mistral"}
