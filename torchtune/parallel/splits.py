"""How tensor parallelism splits each kind of layer: by its outputs, or by its inputs.

A layer split by outputs gives each rank some of them. One that is split by inputs takes those, and gives each rank a
summand of the whole output; what has no place in either is held by all ranks. Source: Shoeybi et al., 2019
(arXiv:1909.08053), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from torchtune.adapters.lora import ExpertsUpdate, LoRAEmbedding, LoRALinear
from torchtune.distributed.mesh import Axis
from torchtune.distributed.part import Part, part_of, set_part
from torchtune.errors import UnsupportedError
from torchtune.modules.attention import Attention
from torchtune.modules.decoder import CausalLM
from torchtune.modules.feed_forward import FeedForward, PlainFeedForward
from torchtune.modules.linear import Conv1D, Linear
from torchtune.modules.mla import LatentAttention
from torchtune.modules.moe import Experts
from torchtune.modules.norms import LayerNorm, RMSNorm
from torchtune.modules.vocabulary import VocabularyShare

_ATTRIBUTE = "_split_over_tensor_axis"


def unsplit_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that all ranks of the tensor axis hold alike, by name.

    Each rank has the gradient from its own tokens, heads or columns; the whole gradient is the sum over the axis.
    """
    return {
        f"{path}.{name}" if path else name: parameter
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name not in module.__dict__.get(_ATTRIBUTE, ())
    }


def split_attention(attention: Attention, axis: Axis) -> None:
    """Each rank some of the heads."""
    query_size = num_inputs(attention.o_proj)
    kv_size = query_size // attention.heads_per_kv_head
    if attention.fused == "whole":
        split_outputs(attention.qkv_proj, axis, stretches=(query_size, kv_size, kv_size))
    elif attention.fused == "by_head":
        split_outputs(attention.qkv_proj, axis)
    else:
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
            split_outputs(layer, axis)
    split_inputs(attention.o_proj, axis)
    _split(attention, "sinks", 0, axis)
    for norm in (attention.q_norm, attention.k_norm) if attention.norm_at is not None else ():
        if isinstance(norm, RMSNorm) and attention.norm_at == "flat":
            _split(norm, "weight", 0, axis)
            norm.axis = axis
        elif isinstance(norm, LayerNorm) and norm.weight.dim() > 1:  # a row for each head
            _split(norm, "weight", 0, axis)
            _split(norm, "bias", 0, axis)


def split_latent_attention(attention: LatentAttention, axis: Axis) -> None:
    """Each rank some of the heads; the projections into the small vectors are no head's."""
    split_outputs(attention.q_b_proj if attention.has_query_rank else attention.q_proj, axis)
    split_outputs(attention.kv_b_proj, axis)
    split_inputs(attention.o_proj, axis)


def split_feed_forward(mlp: FeedForward | PlainFeedForward, axis: Axis) -> None:
    """Each rank some of the intermediate dims."""
    if isinstance(mlp, PlainFeedForward):
        split_outputs(mlp.up_proj, axis)
    elif mlp.fused:
        size = num_inputs(mlp.down_proj)
        split_outputs(mlp.gate_up_proj, axis, stretches=(size, size))
    else:
        split_outputs(mlp.gate_proj, axis)
        split_outputs(mlp.up_proj, axis)
    split_inputs(mlp.down_proj, axis)


def split_experts(experts: Experts, axis: Axis) -> None:
    """Each rank some of the intermediate dims of every expert."""
    size = experts.intermediate_size
    stretches = () if experts.interleaved else (size, size)
    out_dim, in_dim = (2, 1) if experts.transposed else (1, 2)
    _split(experts, "gate_up_proj", out_dim, axis, stretches)
    _split(experts, "gate_up_proj_bias", 1, axis, stretches)
    _split(experts, "down_proj", in_dim, axis)
    experts.down_bias_share = 1 / axis.size
    for kind, update in experts.updates.items():
        assert isinstance(update, ExpertsUpdate)
        if kind == "gate_up_proj":
            _split(update.lora_B, "weight", 1, axis, stretches)
        else:
            _split(update.lora_A, "weight", 2, axis)


def split_vocabulary(model: CausalLM, axis: Axis) -> VocabularyShare:
    """Each rank some of the rows of embedding and head."""
    embedding = model.model.embed_tokens
    share = VocabularyShare(axis, embedding.num_embeddings)
    _split(embedding, "weight", 0, axis)
    if isinstance(embedding, LoRAEmbedding):
        _split(embedding, "lora_embedding_A", 1, axis)
    embedding.num_embeddings = share.sizes[axis.rank]
    if not model.is_tied:
        split_outputs(model.lm_head, axis)
    model.vocabulary = share
    return share


def num_inputs(layer: nn.Module) -> int:
    """The inputs of a linear layer, of those that this rank has."""
    assert isinstance(layer, Linear | Conv1D | LoRALinear)
    return layer.in_features


def split_outputs(layer: nn.Module, axis: Axis, *, stretches: Sequence[int] = ()) -> None:
    """Each rank some of the outputs of a linear layer.

    Args:
        stretches: numbers of outputs that lie one after the other and are shared each for itself, as gate and up.
    """
    _prepare(layer)
    assert isinstance(layer, Linear | Conv1D | LoRALinear)
    _split(layer, "weight", 1 if layer.transposed else 0, axis, stretches)
    _split(layer, "bias", 0, axis, stretches)
    if isinstance(layer, LoRALinear):
        _split(layer.lora_B, "weight", 0, axis, stretches)
        _split(layer, "lora_magnitude_vector", 0, axis, stretches)
    layer.out_features = layer.weight.shape[1 if layer.transposed else 0]


def split_inputs(layer: nn.Module, axis: Axis) -> None:
    """Each rank some of the inputs of a linear layer; the ranks' outputs are to be added up, bias included."""
    _prepare(layer)
    assert isinstance(layer, Linear | Conv1D | LoRALinear)
    _split(layer, "weight", 0 if layer.transposed else 1, axis)
    if isinstance(layer, LoRALinear):
        _split(layer.lora_A, "weight", 1, axis)
        layer.input_axis = axis
    layer.bias_share = 1 / axis.size
    layer.in_features = layer.weight.shape[0 if layer.transposed else 1]


def _prepare(layer: nn.Module) -> None:
    if not isinstance(layer, LoRALinear):
        return
    if layer.initial is not None:
        raise UnsupportedError(
            "this PiSSA adapter's weights are loaded and can't be split any more; apply tensor parallelism before "
            "they are read"
        )
    layer.forget_norms()


def _split(module: nn.Module, name: str, dim: int, axis: Axis, stretches: Sequence[int] = ()) -> None:
    """Keep this rank's share of `module`'s own parameter `name` along `dim`, if it has that parameter."""
    parameter = getattr(module, name)
    if parameter is None:
        return
    share = Part.all_of(parameter.shape).take(dim, axis.rank, axis.size, stretches=stretches)
    set_part(module, name, part_of(module, name).take(dim, axis.rank, axis.size, stretches=stretches))
    # A copy: a view would keep the whole in memory.
    held = share.of(parameter.detach()).clone(memory_format=torch.contiguous_format)
    setattr(module, name, nn.Parameter(held, parameter.requires_grad))
    module.__dict__.setdefault(_ATTRIBUTE, set()).add(name)
