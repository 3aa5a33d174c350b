"""What the Llama kind of families share: their config keys, as options of the blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from torchtune.models.config import HFConfig
from torchtune.modules.attention import Attention
from torchtune.modules.decoder import CausalLM, Decoder, DecoderLayer
from torchtune.modules.feed_forward import ACTIVATIONS, FeedForward
from torchtune.modules.rotary import build_rotary


def build_llama_kind(
    config: HFConfig,
    *,
    qkv_bias: bool,
    output_bias: bool,
    mlp_bias: bool = False,
    qk_norm: Callable[[], nn.Module] | None = None,
    windows: Sequence[int | None] | None = None,
) -> CausalLM:
    """A decoder of pre-normed attention and gated feed-forward layers.

    Args:
        qkv_bias, output_bias, mlp_bias: which linears have biases.
        qk_norm: makes the norm over each query and key head.
        windows: the sliding window of each layer.
    """
    config.refuse("hidden_act", tuple(ACTIVATIONS))
    config.refuse("attention_dropout", (0.0, 0, None))
    config.refuse("pretraining_tp", (1, None))
    layers = [
        DecoderLayer(
            Attention(
                hidden_size=config.hidden_size,
                num_heads=config.num_attention_heads,
                num_kv_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                qkv_bias=qkv_bias,
                output_bias=output_bias,
                q_norm=qk_norm() if qk_norm else None,
                k_norm=qk_norm() if qk_norm else None,
                window=windows[index] if windows else None,
            ),
            FeedForward(config.hidden_size, config.intermediate_size, activation=config.hidden_act, bias=mlp_bias),
            hidden_size=config.hidden_size,
            eps=config.rms_norm_eps,
        )
        for index in range(config.num_hidden_layers)
    ]
    rotary = build_rotary(
        config.rope_parameters,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
    )
    decoder = Decoder(
        layers,
        rotary,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        eps=config.rms_norm_eps,
        max_positions=config.max_position_embeddings,
    )
    return CausalLM(decoder, tie_word_embeddings=bool(config.tie_word_embeddings))
