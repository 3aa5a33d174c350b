"""Small configs of families that differ in what attention sees, or what else depends on more than one token."""

_SIZES = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_LLAMA = {**_SIZES, "model_type": "llama"}
_LATENT = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
}
_ROUTER = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 5.0}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 5.0, 8.0],
    "original_max_position_embeddings": 16,
}

FAMILIES = {
    "llama": _LLAMA,
    "llama with longrope": {**_LLAMA, "rope_parameters": _LONGROPE},
    "llama with dynamic rotary": {
        **_LLAMA,
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    },
    "gemma2": {**_SIZES, "model_type": "gemma2", "sliding_window": 6, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**_SIZES, "model_type": "gemma3_text", "sliding_window": 6, "sliding_window_pattern": 2},
    "gpt_oss": {
        **_SIZES,
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 6,
    },
    "gpt_oss with its router's loss": {**_SIZES, "model_type": "gpt_oss", "sliding_window": 6, **_ROUTER},
    "mixtral with its router's loss": {**_SIZES, "model_type": "mixtral", **_ROUTER},
    "llama4_text": {
        **_SIZES,
        "model_type": "llama4_text",
        "num_hidden_layers": 4,
        "intermediate_size_mlp": 20,
        "num_local_experts": 4,
        "attention_chunk_size": 7,
        "floor_scale": 5,
    },
    "deepseek_v2": {**_SIZES, "model_type": "deepseek_v2", **_LATENT},
    "deepseek_v3": {**_SIZES, "model_type": "deepseek_v3", **_LATENT},
    "gpt2": {"model_type": "gpt2", "vocab_size": 97, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "qwen3": {**_SIZES, "model_type": "qwen3"},
}
