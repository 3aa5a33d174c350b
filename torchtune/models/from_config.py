"""Blocks from a config's usual keys: what a family file starts from, and changes where the family differs.

Whatever is passed as `options` goes to the block and wins over what the config says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from torchtune.models.config import HFConfig
from torchtune.modules.activations import ACTIVATIONS
from torchtune.modules.attend import Scores
from torchtune.modules.attention import Attention
from torchtune.modules.decoder import CausalLM, Decoder
from torchtune.modules.feed_forward import FeedForward
from torchtune.modules.naming import rename_children
from torchtune.modules.norms import RMSNorm
from torchtune.modules.rotary import RotaryEmbedding, build_rotary


def attention_from(
    config: HFConfig,
    *,
    bias: bool = False,
    scale: float | None = None,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> Attention:
    """Grouped-query attention.

    Args:
        bias: whether the projections have biases, unless `qkv_bias` or `output_bias` say otherwise.
        scale, window, chunk, softcap: as in `Scores`; 1 / sqrt(head_dim), and all is seen.
    """
    sizes = {
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "qkv_bias": bias,
        "output_bias": bias,
        "scores": Scores(config.head_dim**-0.5 if scale is None else scale, window, chunk, softcap),
    }
    return Attention(**{**sizes, **options})


def feed_forward_from(config: HFConfig, *, act: str = "hidden_act", **options: Any) -> FeedForward:
    """A gated feed-forward block.

    Args:
        act: the key that names the activation.
    """
    size = options.pop("intermediate_size", None) or config.intermediate_size
    return FeedForward(config.hidden_size, size, activation=activation_from(config, act), **options)


def activation_from(config: HFConfig, key: str = "hidden_act") -> str:
    """The name of the activation function.

    Raises:
        UnsupportedError: one that is not built here.
    """
    config.refuse(key, tuple(ACTIVATIONS))
    return str(config.get(key, "silu"))


def norms_from(config: HFConfig, *names: str, **options: Any) -> dict[str, Any]:
    """An RMSNorm over the stream for each name."""
    return {name: RMSNorm(config.hidden_size, config.rms_norm_eps, **options) for name in names}


def rotary_from(config: HFConfig, rope: Mapping[str, Any] | None = None, **options: Any) -> RotaryEmbedding:
    """The rotary embedding of the config, or of the rotary options `rope`."""
    sizes = {"head_dim": config.head_dim, "max_position_embeddings": config.max_position_embeddings}
    return build_rotary(config.rope_parameters if rope is None else rope, **{**sizes, **options})


def decoder_from(
    config: HFConfig,
    layer: Callable[[int], nn.Module],
    rotary: RotaryEmbedding | Sequence[RotaryEmbedding | None] | None,
    *,
    norm: nn.Module | None = None,
    names: Mapping[str, str] | None = None,
    decoder: Mapping[str, Any] | None = None,
    **options: Any,
) -> CausalLM:
    """The whole model.

    Args:
        layer: makes a layer by its index.
        rotary: of all layers, or of each.
        norm: the last norm; RMSNorm by default.
        names: the checkpoint's names of parts, where they are not ours (`rename_children`).
        decoder: options of `Decoder`; the others are `CausalLM`'s.
    """
    config.leave_off_dropout("attention_dropout")
    num_layers = config.num_hidden_layers
    model = CausalLM(
        Decoder(
            [layer(index) for index in range(num_layers)],
            rotary if isinstance(rotary, Sequence) else [rotary] * num_layers,
            norm or RMSNorm(config.hidden_size, config.rms_norm_eps),
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            **{"max_positions": config.reach(config.max_position_embeddings), **(decoder or {})},
        ),
        tie_word_embeddings=bool(config.tie_word_embeddings),
        **options,
    )
    rename_children(model, names or {})
    return model
