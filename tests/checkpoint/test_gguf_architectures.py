"""GGUF files of each architecture, written from random Hugging Face models, compute what these compute.

Where transformers reads an architecture too, its reading of the same file is compared as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.auto import AutoModelForCausalLM

from tests.checkpoint.made_gguf import as_in_file, metadata_of, write
from tests.models.oracle import assert_close, save_random, stored_tensors
from torchtune.checkpoint.load import load_model
from torchtune.checkpoint.open import open_checkpoint
from torchtune.checkpoint.save import save_model
from torchtune.errors import CheckpointError, UnsupportedError

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
LLAMA = {**SIZES, **HEADS, **NO_TOKENS, "max_position_embeddings": 96}
# What no key of a file says, and nothing computes with.
NOT_IN_FILES = ("_name_or_path", "initializer_range", "use_cache")


@dataclass
class Case:
    """A config and its file's metadata.

    Attributes:
        metadata: keys of the architecture beside the usual, `__` for a dot.
        tensors: what the file has beside the model's, from the model.
        both: whether transformers reads such a file, and rightly.
    """

    arch: str
    config: Callable[..., Any]
    options: dict[str, Any]
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: Callable[[Any], dict[str, np.ndarray]] = lambda model: {}
    both: bool = False


def divisors_of_frequencies(model: Any) -> dict[str, np.ndarray]:
    """Llama 3.1's rope_freqs, from the frequencies that transformers computes with."""
    scaled = model.model.rotary_emb.inv_freq.double().numpy()
    theta = model.config.rope_parameters["rope_theta"]
    plain = theta ** -(np.arange(0, 2 * len(scaled), 2) / (2 * len(scaled)))
    return {"rope_freqs.weight": (plain / scaled).astype(np.float32)}


def a_further_layer(model: Any) -> dict[str, np.ndarray]:
    """What GLM-4.5 predicts the token after the next with; sizes as for `LLAMA`, values of no account."""
    width, experts, inner = 32, 4, 24
    sizes: dict[str, tuple[int, ...]] = {
        "attn_norm": (width,),
        "post_attention_norm": (width,),
        "attn_q": (32, width),
        "attn_k": (16, width),
        "attn_v": (16, width),
        "attn_output": (width, 32),
        "attn_q_norm": (8,),
        "attn_k_norm": (8,),
        "ffn_gate_inp": (experts, width),
        "ffn_gate_exps": (experts, inner, width),
        "ffn_up_exps": (experts, inner, width),
        "ffn_down_exps": (experts, width, inner),
        "ffn_gate_shexp": (inner, width),
        "ffn_up_shexp": (inner, width),
        "ffn_down_shexp": (width, inner),
        "nextn.eh_proj": (width, 2 * width),
        "nextn.enorm": (width,),
        "nextn.hnorm": (width,),
    }
    layer = {f"blk.3.{name}.weight": np.ones(size, np.float32) for name, size in sizes.items()}
    return layer | {"blk.3.exp_probs_b.bias": np.zeros(experts, np.float32)}


LONG, SHORT = [1.5, 2.0, 3.0, 6.0], [1.0, 1.25, 1.5, 2.0]


DEEPSEEK = {
    **LLAMA,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 8,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
DEEPSEEK_KEYS = {
    "attention__kv_lora_rank": 16,
    "rope__dimension_count": 6,
    "leading_dense_block_count": 1,
    "expert_feed_forward_length": 24,
    "expert_count": 4,
    "expert_used_count": 2,
    "expert_shared_count": 1,
    "expert_weights_scale": 1.0,
    "expert_weights_norm": False,
    "expert_gating_func": 1,
}

CASES = {
    "llama": Case("llama", transformers.LlamaConfig, LLAMA, {"rope__dimension_count": 8}, both=True),
    "llama tied, biased, own head_dim": Case(
        "llama",
        transformers.LlamaConfig,
        {**LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 10},
        {"attention__key_length": 10, "attention__value_length": 10, "rope__dimension_count": 10},
    ),
    "llama 3.1": Case(
        "llama",
        transformers.LlamaConfig,
        {
            **LLAMA,
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        {"rope__dimension_count": 8},
        tensors=divisors_of_frequencies,
    ),
    "llama, linear": Case(
        "llama",
        transformers.LlamaConfig,
        {**LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        {"rope__dimension_count": 8, "rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
    ),
    "qwen2, yarn": Case(
        "qwen2",
        transformers.Qwen2Config,
        {
            **LLAMA,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 24,
            },
        },
        {
            "rope__scaling__type": "yarn",
            "rope__scaling__factor": 4.0,
            "rope__scaling__original_context_length": 24,
        },
    ),
    "phi3, long": Case(
        "phi3",
        transformers.Phi3Config,
        {
            **LLAMA,
            "original_max_position_embeddings": 24,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "long_factor": LONG,
                "short_factor": SHORT,
                "original_max_position_embeddings": 24,
            },
        },
        {
            "rope__dimension_count": 8,
            "rope__scaling__original_context_length": 24,
            "rope__scaling__attn_factor": float(np.sqrt(1 + np.log(4) / np.log(24))),
        },
        tensors=lambda model: {
            "rope_factors_long.weight": np.array(LONG, np.float32),
            "rope_factors_short.weight": np.array(SHORT, np.float32),
        },
    ),
    "mixtral": Case(
        "llama",
        transformers.MixtralConfig,
        {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None, "rope_theta": 1e6},
        {"expert_count": 4, "expert_used_count": 2},
    ),
    "qwen2": Case("qwen2", transformers.Qwen2Config, LLAMA, both=True),
    "qwen3": Case(
        "qwen3",
        transformers.Qwen3Config,
        {**LLAMA, "head_dim": 12, "rope_theta": 1e6},
        {"attention__key_length": 12, "attention__value_length": 12},
    ),
    "qwen2moe": Case(
        "qwen2moe",
        transformers.Qwen2MoeConfig,
        {
            **LLAMA,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
        },
        {
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": 24,
            "expert_shared_feed_forward_length": 40,
        },
    ),
    "qwen3moe": Case(
        "qwen3moe",
        transformers.Qwen3MoeConfig,
        {
            **LLAMA,
            "head_dim": 12,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "moe_intermediate_size": 24,
        },
        {
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": 24,
            "attention__key_length": 12,
            "attention__value_length": 12,
        },
    ),
    "gemma": Case(
        "gemma",
        transformers.GemmaConfig,
        {**LLAMA, "head_dim": 12},
        {"attention__key_length": 12, "attention__value_length": 12},
    ),
    "gemma2": Case(
        "gemma2",
        transformers.Gemma2Config,
        {**LLAMA, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 8},
        {
            "attention__key_length": 256,
            "attention__value_length": 256,
            "attention__sliding_window": 8,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        both=True,
    ),
    "gemma3": Case(
        "gemma3",
        transformers.Gemma3TextConfig,
        {
            **LLAMA,
            "num_hidden_layers": 7,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 8,
            "hidden_size": 24,
        },
        {
            "attention__key_length": 256,
            "attention__value_length": 256,
            "attention__sliding_window": 8,
            "rope__freq_base": 1e6,
        },
        both=True,
    ),
    "gemma3, linear": Case(
        "gemma3",
        transformers.Gemma3TextConfig,
        {
            **LLAMA,
            "num_hidden_layers": 7,
            "head_dim": 12,
            "query_pre_attn_scalar": 12,
            "sliding_window": 8,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
            },
        },
        {
            "attention__key_length": 12,
            "attention__value_length": 12,
            "attention__sliding_window": 8,
            "rope__freq_base": 1e6,
            "rope__scaling__type": "linear",
            "rope__scaling__factor": 8.0,
        },
    ),
    "starcoder2": Case("starcoder2", transformers.Starcoder2Config, {**LLAMA, "norm_epsilon": 1e-5}),
    "stablelm": Case(
        "stablelm",
        transformers.StableLmConfig,
        {**LLAMA, "use_qkv_bias": True, "partial_rotary_factor": 0.25, "num_key_value_heads": 4},
        {"rope__dimension_count": 2, "use_parallel_residual": False},
        both=True,
    ),
    "stablelm, parallel, norms of heads": Case(
        "stablelm",
        transformers.StableLmConfig,
        {**LLAMA, "qk_layernorm": True, "use_parallel_residual": True, "partial_rotary_factor": 0.5},
        {"rope__dimension_count": 4, "use_parallel_residual": True},
    ),
    "granite": Case(
        "granite",
        transformers.GraniteConfig,
        {
            **LLAMA,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 4.0,
        },
        {"attention__scale": 0.2, "embedding_scale": 3.0, "residual_scale": 0.5, "logit_scale": 4.0},
    ),
    "granitemoe": Case(
        "granitemoe",
        transformers.GraniteMoeConfig,
        {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "attention_multiplier": 0.2},
        {"expert_count": 4, "expert_used_count": 2, "attention__scale": 0.2, "logit_scale": 1.0},
    ),
    "granitemoe, shared": Case(
        "granitemoe",
        transformers.GraniteMoeSharedConfig,
        {
            **LLAMA,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 40,
            "attention_multiplier": 0.2,
            "logits_scaling": 4.0,
        },
        {
            "expert_count": 4,
            "expert_used_count": 2,
            "attention__scale": 0.2,
            "logit_scale": 4.0,
            "expert_shared_feed_forward_length": 40,
        },
    ),
    "olmo2": Case("olmo2", transformers.Olmo2Config, {**LLAMA, "rope_theta": 5e5}),
    "olmo3": Case(
        "olmo2",
        transformers.Olmo3Config,
        {**LLAMA, "num_hidden_layers": 5, "sliding_window": 8},
        {"attention__sliding_window": 8, "rope__freq_base": 5e5},
    ),
    "olmo3, yarn": Case(
        "olmo2",
        transformers.Olmo3Config,
        {
            **LLAMA,
            "num_hidden_layers": 5,
            "sliding_window": 8,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 500000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 24,
                },
            },
        },
        {
            "attention__sliding_window": 8,
            "rope__freq_base": 5e5,
            "rope__scaling__type": "yarn",
            "rope__scaling__factor": 4.0,
            "rope__scaling__original_context_length": 24,
        },
    ),
    "olmoe": Case(
        "olmoe",
        transformers.OlmoeConfig,
        {**LLAMA, "num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2},
        {"expert_count": 4, "expert_used_count": 2},
    ),
    "command-r": Case("command-r", transformers.CohereConfig, {**LLAMA, "logit_scale": 0.25}, {"logit_scale": 0.25}),
    "command-r, norms of heads": Case(
        "command-r",
        transformers.CohereConfig,
        {**LLAMA, "logit_scale": 0.25, "use_qk_norm": True},
        {"logit_scale": 0.25},
    ),
    "cohere2": Case(
        "cohere2",
        transformers.Cohere2Config,
        {**LLAMA, "num_hidden_layers": 5, "sliding_window": 8, "logit_scale": 0.25},
        {"logit_scale": 0.25, "attention__sliding_window": 8, "rope__dimension_count": 8},
    ),
    "smollm3": Case("smollm3", transformers.SmolLM3Config, {**LLAMA, "num_hidden_layers": 5}),
    "phi2": Case(
        "phi2",
        transformers.PhiConfig,
        {**LLAMA, "partial_rotary_factor": 0.5},
        {"rope__dimension_count": 4},
    ),
    "phi3": Case("phi3", transformers.Phi3Config, LLAMA, {"rope__dimension_count": 8}),
    "gpt2": Case(
        "gpt2",
        transformers.GPT2Config,
        {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 96, **NO_TOKENS},
        {"feed_forward_length": 128, "attention__layer_norm_epsilon": 1e-5},
    ),
    "gptneox": Case(
        "gptneox",
        transformers.GPTNeoXConfig,
        {**SIZES, **NO_TOKENS, "num_attention_heads": 4, "max_position_embeddings": 96, "rotary_pct": 0.5},
        {"rope__dimension_count": 4, "use_parallel_residual": True},
    ),
    "gptneox, in series": Case(
        "gptneox",
        transformers.GPTNeoXConfig,
        {
            **SIZES,
            **NO_TOKENS,
            "num_attention_heads": 4,
            "max_position_embeddings": 96,
            "rotary_pct": 1.0,
            "use_parallel_residual": False,
        },
        {"rope__dimension_count": 8, "use_parallel_residual": False},
    ),
    "glm4": Case(
        "glm4",
        transformers.Glm4Config,
        {**LLAMA, "head_dim": 12, "rms_norm_eps": 1e-5},
        {"rope__dimension_count": 6, "attention__key_length": 12, "attention__value_length": 12},
    ),
    "glm4moe": Case(
        "glm4moe",
        transformers.Glm4MoeConfig,
        {
            **LLAMA,
            "head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 2.0,
            "use_qk_norm": True,
            "rms_norm_eps": 1e-5,
        },
        {
            "block_count": 4,
            "nextn_predict_layers": 1,
            "rope__dimension_count": 4,
            "attention__key_length": 8,
            "attention__value_length": 8,
            "leading_dense_block_count": 1,
            "expert_feed_forward_length": 24,
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_shared_count": 1,
            "expert_weights_scale": 2.0,
            "expert_weights_norm": True,
            "expert_gating_func": 2,
        },
        tensors=a_further_layer,
    ),
    "chatglm": Case(
        "chatglm",
        transformers.GlmConfig,
        {**LLAMA, "head_dim": 8},
        {"rope__dimension_count": 4},
    ),
    "mistral3": Case(
        "mistral3",
        transformers.Ministral3Config,
        {
            **LLAMA,
            "head_dim": 12,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 24,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        {
            "rope__dimension_count": 12,
            "attention__key_length": 12,
            "attention__value_length": 12,
            "attention__temperature_scale": 0.1,
            "rope__scaling__type": "yarn",
            "rope__scaling__factor": 4.0,
            "rope__scaling__original_context_length": 24,
            "rope__scaling__yarn_beta_fast": 32.0,
            "rope__scaling__yarn_beta_slow": 1.0,
            "rope__scaling__yarn_log_multiplier": 1.0,
        },
    ),
    "deepseek2, V2": Case(
        "deepseek2",
        transformers.DeepseekV2Config,
        {**DEEPSEEK, "q_lora_rank": None, "topk_method": "greedy", "norm_topk_prob": False},
        {**DEEPSEEK_KEYS, "attention__key_length": 14, "attention__value_length": 10},
    ),
    "deepseek2, V2, groups": Case(
        "deepseek2",
        transformers.DeepseekV2Config,
        {
            **DEEPSEEK,
            "q_lora_rank": 20,
            "topk_method": "group_limited_greedy",
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 4.0,
            "norm_topk_prob": False,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 24,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
            },
        },
        {
            **DEEPSEEK_KEYS,
            "attention__q_lora_rank": 20,
            "attention__head_count_kv": 1,
            "attention__key_length": 16 + 6,
            "attention__value_length": 16,
            "attention__key_length_mla": 14,
            "attention__value_length_mla": 10,
            "expert_weights_scale": 4.0,
            "expert_group_count": 2,
            "expert_group_used_count": 1,
            "rope__scaling__type": "yarn",
            "rope__scaling__factor": 4.0,
            "rope__scaling__original_context_length": 24,
            "rope__scaling__yarn_log_multiplier": 0.0707,
        },
    ),
    "deepseek2, V3": Case(
        "deepseek2",
        transformers.DeepseekV3Config,
        {
            **DEEPSEEK,
            "q_lora_rank": 20,
            "n_group": 2,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 24,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
        {
            **DEEPSEEK_KEYS,
            "attention__q_lora_rank": 20,
            "attention__head_count_kv": 1,
            "attention__key_length": 16 + 6,
            "attention__value_length": 16,
            "attention__key_length_mla": 14,
            "attention__value_length_mla": 10,
            "expert_weights_scale": 2.5,
            "expert_weights_norm": True,
            "expert_gating_func": 2,
            "expert_group_count": 2,
            "expert_group_used_count": 1,
            "rope__scaling__type": "yarn",
            "rope__scaling__factor": 4.0,
            "rope__scaling__original_context_length": 24,
            "rope__scaling__yarn_log_multiplier": 0.1,
        },
    ),
    "llama4": Case(
        "llama4",
        transformers.Llama4TextConfig,
        {
            **LLAMA,
            "num_hidden_layers": 5,
            "head_dim": 8,
            "intermediate_size": 24,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "use_qk_norm": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
        {
            "feed_forward_length": 48,
            "expert_feed_forward_length": 24,
            "expert_count": 4,
            "expert_used_count": 1,
            "interleave_moe_layer_step": 2,
            "rope__dimension_count": 8,
            "attention__key_length": 8,
            "attention__value_length": 8,
        },
    ),
    "llama4, scaled as Scout": Case(
        "llama4",
        transformers.Llama4TextConfig,
        {
            **LLAMA,
            "num_hidden_layers": 5,
            "head_dim": 8,
            "intermediate_size": 24,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "use_qk_norm": True,
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 16.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
            },
        },
        {
            "feed_forward_length": 48,
            "expert_feed_forward_length": 24,
            "expert_count": 4,
            "expert_used_count": 1,
            "interleave_moe_layer_step": 2,
            "rope__dimension_count": 8,
            "attention__key_length": 8,
            "attention__value_length": 8,
        },
        tensors=divisors_of_frequencies,
    ),
    "gpt-oss": Case(
        "gpt-oss",
        transformers.GptOssConfig,
        {
            **LLAMA,
            "head_dim": 12,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
        },
        {
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": 48,
            "attention__key_length": 12,
            "attention__value_length": 12,
            "attention__sliding_window": 8,
        },
    ),
    "gpt-oss, yarn": Case(
        "gpt-oss",
        transformers.GptOssConfig,
        {
            **LLAMA,
            "head_dim": 12,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 24,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
            },
        },
        {
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": 48,
            "attention__key_length": 12,
            "attention__value_length": 12,
            "attention__sliding_window": 8,
            "rope__scaling__type": "yarn",
            "rope__scaling__factor": 4.0,
            "rope__scaling__original_context_length": 24,
            "rope__scaling__yarn_beta_fast": 32.0,
            "rope__scaling__yarn_beta_slow": 1.0,
        },
    ),
}


def make(folder: Path, case: Case, **options: Any) -> tuple[Any, Path]:
    """transformers' model and the file of it."""
    config = case.config(**case.options)
    theirs = save_random(folder / "hf", config)
    tensors = {name: tensor.numpy() for name, tensor in stored_tensors(folder / "hf").items()}
    path = folder / "tiny.gguf"
    apart = "attention__key_length_mla" in case.metadata
    in_file = as_in_file(case.arch, config, tensors, keys_and_values_apart=apart) | case.tensors(theirs)
    write(path, case.arch, in_file, metadata_of(config, **case.metadata), **options)
    return theirs, path


def some_ids() -> torch.Tensor:
    return torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_the_model_that_it_was_made_from(tmp_path, name):
    """Logits, read by us, by transformers where it can, and saved as a folder; each field of the config."""
    case = CASES[name]
    theirs, path = make(tmp_path, case)
    ids = some_ids()
    expected = theirs(ids).logits
    model = load_model(path)
    assert_close(model(ids), expected, 1e-5, "logits")
    if case.both:
        reading = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
        assert_close(reading(ids).logits, expected, 1e-5, "transformers' logits")
    save_model(tmp_path / "out", model, open_checkpoint(path))
    saved, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_close(saved(ids).logits, expected, 1e-5, "logits of what was saved")
    assert type(saved) is type(theirs)
    found, said = saved.config.to_dict(), theirs.config.to_dict()
    if said.get("head_dim") is None:  # the same number, written out
        found.pop("head_dim", None)
    different = {key: (found.get(key), value) for key, value in said.items() if found.get(key) != value}
    for key in NOT_IN_FILES:
        different.pop(key, None)
    assert not different


def test_experts_beyond_those_of_the_metadata_are_refused(tmp_path):
    """Rather than left out."""
    case = CASES["mixtral"]
    _, path = make(tmp_path, dataclasses.replace(case, metadata={**case.metadata, "expert_count": 3}))
    with pytest.raises(CheckpointError, match=r"_exps.weight' has 4 parts where its metadata says 3"):
        open_checkpoint(path)


def test_deepseek_without_its_groups_is_refused(tmp_path):
    """Files of a time when the key was not written would choose other experts."""
    case = CASES["deepseek2, V2"]
    _, path = make(tmp_path, dataclasses.replace(case, metadata={**case.metadata, "expert_count": 160}))
    with pytest.raises(UnsupportedError, match=r"did not write expert_group_count"):
        open_checkpoint(path)


def test_layers_for_further_tokens_are_said_to_be_left_out(tmp_path, caplog):
    """And are unknown tensors where the file does not say that it has such."""
    case = CASES["glm4moe"]
    _, path = make(tmp_path, case)
    open_checkpoint(path)
    assert "the 19 tensors that predict further tokens are left out" in caplog.text
    _, path = make(tmp_path, dataclasses.replace(case, metadata={**case.metadata, "nextn_predict_layers": 0}))
    with pytest.raises(UnsupportedError, match=r"tensors have no place in a model"):
        open_checkpoint(path)
