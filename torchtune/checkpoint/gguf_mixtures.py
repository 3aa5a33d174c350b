"""The config.json of GGUF architectures with experts; see gguf_architectures.py."""

from __future__ import annotations

from torchtune.checkpoint.gguf import GGUFHeader
from torchtune.checkpoint.gguf_keys import Config, common, decimal, has, number, partial_rotary, shape, windows
from torchtune.errors import UnsupportedError

SOFTMAX, SIGMOID = 1, 2  # of `expert_gating_func`
GROUPED_EXPERTS = (160, 256)  # how many DeepSeek V2 and V3 have


def mixtral(file: GGUFHeader) -> Config:
    """Mixtral, which files call a llama."""
    return {
        **common(file, "mixtral", "MixtralForCausalLM"),
        "num_local_experts": number(file, "expert_count"),
        "num_experts_per_tok": number(file, "expert_used_count"),
        "sliding_window": None,
    }


def _experts(file: GGUFHeader, num_experts: str, *, normalised: bool) -> Config:
    return {
        num_experts: number(file, "expert_count"),
        "num_experts_per_tok": number(file, "expert_used_count"),
        "norm_topk_prob": bool(file.get("expert_weights_norm", normalised)),
    }


def qwen2_moe(file: GGUFHeader) -> Config:
    """Qwen1.5-MoE and Qwen2-MoE."""
    return {
        **common(file, "qwen2_moe", "Qwen2MoeForCausalLM"),
        **_experts(file, "num_experts", normalised=False),
        "moe_intermediate_size": shape(file, "ffn_down_exps.weight")[-1],
        "shared_expert_intermediate_size": shape(file, "ffn_down_shexp.weight")[-1],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def qwen3_moe(file: GGUFHeader) -> Config:
    """Qwen3 with experts."""
    return {
        **common(file, "qwen3_moe", "Qwen3MoeForCausalLM"),
        **_experts(file, "num_experts", normalised=True),
        "moe_intermediate_size": shape(file, "ffn_down_exps.weight")[-1],
        "attention_bias": has(file, "attn_q.bias"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def multipliers(file: GGUFHeader, config: Config) -> Config:
    """Granite's four factors; scores are scaled as everywhere where the file has no factor for them."""
    return {
        "attention_multiplier": decimal(file.get("attention.scale") or config["head_dim"] ** -0.5),
        "embedding_multiplier": decimal(file.get("embedding_scale") or 1.0),
        "residual_multiplier": decimal(file.get("residual_scale") or 1.0),
        "logits_scaling": decimal(file.get("logit_scale") or 1.0),
    }


def granite_moe(file: GGUFHeader) -> Config:
    """Granite with experts, with or without shared ones."""
    is_shared = has(file, "ffn_down_shexp.weight")
    model_type, model_class = (
        ("granitemoeshared", "GraniteMoeSharedForCausalLM") if is_shared else ("granitemoe", "GraniteMoeForCausalLM")
    )
    config = common(file, model_type, model_class)
    config |= {
        **multipliers(file, config),
        "intermediate_size": shape(file, "ffn_down_exps.weight")[-1],
        "num_local_experts": number(file, "expert_count"),
        "num_experts_per_tok": number(file, "expert_used_count"),
        "attention_bias": has(file, "attn_q.bias"),
    }
    if is_shared:
        config["shared_intermediate_size"] = shape(file, "ffn_down_shexp.weight")[-1]
    return config


def olmoe(file: GGUFHeader) -> Config:
    """OLMoE."""
    config = common(file, "olmoe", "OlmoeForCausalLM")
    return {
        **config,
        **_experts(file, "num_experts", normalised=False),
        "intermediate_size": shape(file, "ffn_down_exps.weight")[-1],
        "attention_bias": has(file, "attn_q.bias"),
        "clip_qkv": None,
    }


def glm4_moe(file: GGUFHeader) -> Config:
    """GLM-4.5 and 4.6, without the layers that predict further tokens: the last of the file's."""
    config = common(file, "glm4_moe", "Glm4MoeForCausalLM")
    if file.get("expert_gating_func", SIGMOID) != SIGMOID:
        raise UnsupportedError(f"{file.path}: glm4moe.expert_gating_func is not the sigmoid of GLM-4.5")
    return {
        **config,
        **_experts(file, "n_routed_experts", normalised=True),
        "num_hidden_layers": config["num_hidden_layers"] - int(file.get("nextn_predict_layers", 0)),
        "partial_rotary_factor": partial_rotary(file, config),
        "attention_bias": has(file, "attn_q.bias"),
        "use_qk_norm": has(file, "attn_q_norm.weight"),
        "first_k_dense_replace": int(file.get("leading_dense_block_count", 0)),
        "moe_intermediate_size": shape(file, "ffn_down_exps.weight")[-1],
        "n_shared_experts": number(file, "expert_shared_count"),
        "routed_scaling_factor": decimal(file.get("expert_weights_scale") or 1.0),
        "n_group": int(file.get("expert_group_count") or 1),
        "topk_group": int(file.get("expert_group_used_count") or 1),
    }


def llama4(file: GGUFHeader) -> Config:
    """The text part of Llama 4."""
    config = common(file, "llama4_text", "Llama4ForCausalLM")
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


def deepseek(file: GGUFHeader) -> Config:
    """DeepSeek V2 and V3: the third version has a correction for its sigmoid router."""
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


def gpt_oss(file: GGUFHeader) -> Config:
    """gpt-oss."""
    config = common(file, "gpt_oss", "GptOssForCausalLM")
    return {
        **config,
        **windows(file, config, every=2),
        "intermediate_size": shape(file, "ffn_down_exps.weight")[-1],
        "num_local_experts": number(file, "expert_count"),
        "num_experts_per_tok": number(file, "expert_used_count"),
        "attention_bias": True,
        "swiglu_limit": 7.0,
    }
