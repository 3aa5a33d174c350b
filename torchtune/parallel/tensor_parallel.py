"""Tensor parallelism: the ranks of an axis share each layer, and between layers the tokens.

    residual stream    each rank holds T / size of the tokens; norms are of these alone (sequence parallelism)
    attention, mlp     all tokens are gathered in front; each rank has some heads or intermediate dims; their outputs are
                       added up behind, each rank keeping its own tokens
    vocabulary         each rank has some rows of embedding and head; the loss is over all of them, logits never whole

Within such a block each rank makes a summand of every gradient, and outside of it each sees its own tokens. So the
gradient of a parameter that is not split is the sum over the axis (`unsplit_parameters`); the split ones have theirs.

Sources: Shoeybi et al., 2019 (arXiv:1909.08053); Korthikanti et al., 2022 (arXiv:2205.05198), section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchtune.distributed.collectives import gather, scatter_sum
from torchtune.distributed.mesh import Axis
from torchtune.modules.attention import Attention
from torchtune.modules.decoder import CausalLM
from torchtune.modules.feed_forward import FeedForward, PlainFeedForward
from torchtune.modules.mla import LatentAttention
from torchtune.modules.moe import Experts, MoE
from torchtune.modules.vocabulary import VocabularyShare
from torchtune.parallel.splits import (
    split_attention,
    split_experts,
    split_feed_forward,
    split_latent_attention,
    split_vocabulary,
)
from torchtune.parallel.tensor_sizes import BLOCKS, check_tensor_parallel

Forward = Callable[..., Tensor]


def apply_tensor_parallel(model: CausalLM, axis: Axis) -> None:
    """Give each rank of `axis` its share of `model`, in place; forward and loss stay those of the whole.

    The model may be on the meta device or loaded, with adapters or without; parameters keep their names and become
    plain tensors of the local shape, whose `Part` is noted. The flat token axis of a batch must be a multiple of
    the axis' size. Compilation, checkpointing and FSDP go around it, afterwards.

    Raises:
        ConfigError: sizes that do not divide.
    """
    if axis.size == 1:
        return
    check_tensor_parallel(model, axis.size)
    for module in model.model.layers.modules():
        if isinstance(module, Attention):
            split_attention(module, axis)
        elif isinstance(module, LatentAttention):
            split_latent_attention(module, axis)
        elif isinstance(module, FeedForward | PlainFeedForward):
            split_feed_forward(module, axis)
        elif isinstance(module, Experts):
            split_experts(module, axis)
    share, decoder = split_vocabulary(model, axis), model.model
    _wrap(decoder.embed_tokens, _own_embeddings, share)
    if decoder.has_learned_positions:
        _wrap(decoder.embed_positions, _own_positions, axis)
    _wrap(decoder, _gathered, axis)
    _share_tokens(model, axis)


def _share_tokens(model: CausalLM, axis: Axis) -> None:
    """Let each block of a layer see all tokens [T, D], and give the own ones [T / size, D] of what ranks made."""

    # The same two hooks for all blocks. A forward wrapped on each instance is another one to torch.compile, which would
    # compile every layer anew.
    def before(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return gather(args[0], axis), *args[1:]

    def behind(block: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        if isinstance(block, MoE) and block.keep_router_logits:
            # Every rank makes the whole load-balancing loss of them, and gradients are added up.
            block.router_logits = _ScaledGradient.apply(block.router_logits, 1 / axis.size)
        return scatter_sum(out, axis)

    for layer in model.model.layers:
        for block in layer.children():
            if isinstance(block, BLOCKS):
                block.register_forward_pre_hook(before)
                block.register_forward_hook(behind)


def _wrap(module: nn.Module, outer: Forward, among: Axis | VocabularyShare) -> None:
    module.forward = partial(outer, module.forward, among)


def _own_embeddings(inner: Forward, share: VocabularyShare, input_ids: Tensor) -> Tensor:
    """input_ids [T] -> [T / size, D]: each rank looks up what it has a row for, for all."""
    if len(input_ids) % share.axis.size:
        raise ValueError(
            f"a batch of {len(input_ids)} tokens can't be shared by {share.axis.size} ranks (tensor_parallel); fill it "
            f"up to a multiple: batch.padded_to({share.axis.size})"
        )
    places, is_held = share.places(input_ids)
    return scatter_sum(inner(places).masked_fill(~is_held[:, None], 0.0), share.axis)


def _own_positions(inner: Forward, axis: Axis, positions: Tensor) -> Tensor:
    return inner(positions.chunk(axis.size)[axis.rank])


def _gathered(inner: Forward, axis: Axis, *args: Any, **options: Any) -> Tensor:
    return gather(inner(*args, **options), axis)


class _ScaledGradient(torch.autograd.Function):
    """x itself, whose gradient is multiplied by `scale`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.scale, None
