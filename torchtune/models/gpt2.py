"""GPT-2: learnt positions, layer norms, weights that lie as [in, out], and the embedding for a head.

Spec: Radford et al., 2019. Old files have no `transformer.` before their names, and hold masks, which are carried.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchtune.models.config import HFConfig
from torchtune.models.from_config import activation_from, attention_from, decoder_from
from torchtune.modules.decoder import CausalLM
from torchtune.modules.feed_forward import PlainFeedForward
from torchtune.modules.layers import DecoderLayer
from torchtune.modules.linear import Conv1D
from torchtune.modules.norms import LayerNorm

COVERS = "GPT-2, DistilGPT-2"
DEFAULTS = {
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "n_positions": 1024,
    "vocab_size": 50257,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
}
KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
NAMES = {
    "model": "transformer",
    "embed_tokens": "wte",
    "embed_positions": "wpe",
    "layers": "h",
    "norm": "ln_f",
    "self_attn": "attn",
    "qkv_proj": "c_attn",
    "o_proj": "c_proj",
    "up_proj": "c_fc",
    "down_proj": "c_proj",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
}
PREFIXES: tuple[dict[str, str], ...] = ({}, {"transformer.": ""})


def build(values: Mapping[str, Any]) -> CausalLM:
    """A GPT-2 from its config.json."""
    known = {**DEFAULTS, **values}
    config = HFConfig({**{usual: known[key] for usual, key in KEYS.items()}, **known})
    config.refuse("add_cross_attention", (False,))
    config.leave_off_dropout("resid_pdrop", "embd_pdrop", "attn_pdrop")
    intermediate_size = config.n_inner or 4 * config.hidden_size

    def norm() -> LayerNorm:
        return LayerNorm(config.hidden_size, config.layer_norm_epsilon)

    def layer(index: int) -> DecoderLayer:
        scale = config.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= index + 1
        return DecoderLayer(
            attention_from(config, bias=True, scale=scale, fused="whole", linear=Conv1D),
            PlainFeedForward(
                config.hidden_size,
                intermediate_size,
                activation=activation_from(config, "activation_function"),
                linear=Conv1D,
            ),
            input_layernorm=norm(),
            post_attention_layernorm=norm(),
        )

    positions = {"learned_positions": config.n_positions}
    return decoder_from(config, layer, None, norm=norm(), names=NAMES, prefix_choices=PREFIXES, decoder=positions)
