"""What tensor parallelism needs of a model and its loss, told before anything is split or read."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator

from torch import nn

from torchtune.distributed.mesh import Axis
from torchtune.errors import Problems
from torchtune.modules.attention import Attention
from torchtune.modules.decoder import CausalLM
from torchtune.modules.feed_forward import FeedForward, PlainFeedForward
from torchtune.modules.mla import LatentAttention
from torchtune.modules.moe import Experts, MoE
from torchtune.modules.norms import LayerNorm, PlainRMSNorm, RMSNorm
from torchtune.modules.vocabulary import VocabularyShare
from torchtune.parallel.splits import num_inputs

KEY = "tensor_parallel"
BLOCKS = (Attention, LatentAttention, FeedForward, PlainFeedForward, MoE)
NORMS = (RMSNorm, LayerNorm, PlainRMSNorm)


def check_tensor_parallel(model: CausalLM, size: int, *, loss: Callable[..., object] | None = None) -> None:
    """Refuse what `size` ranks can't share.

    Args:
        model: whole, on any device.
        loss: what it is to be trained with.
    Raises:
        ConfigError: sizes that do not divide, parts of layers that are not known, a loss that takes no shared
            vocabulary; all problems at once.
    """
    if size == 1:
        return
    problems = Problems()
    _check_parts(model, problems)
    _check_sizes(model, size, problems)
    if loss is not None and not _takes_vocabulary(loss):
        problems.add(
            "loss",
            f"'{_name(loss)}' takes no option 'vocabulary', so it can't be computed where {KEY}={size} shares the head; "
            f"torchtune.modules.losses.LinearCrossEntropy can, or set {KEY}=1",
        )
    problems.raise_all()


def _check_sizes(model: CausalLM, size: int, problems: Problems) -> None:
    found: dict[tuple[str, int], str] = {}
    for path, name, number in _sizes(model):
        found.setdefault((name, number), path)
    common = math.gcd(*(number for _, number in found))
    allowed = ", ".join(str(number) for number in range(1, common + 1) if common % number == 0)
    for (name, number), path in found.items():
        if number % size:
            problems.add(
                KEY, f"{name}={number} of '{path}' does not divide by {size}; what this model divides by: {allowed}"
            )
    num_rows = model.model.embed_tokens.num_embeddings
    if not all(VocabularyShare(Axis(size), num_rows).sizes):
        problems.add(KEY, f"vocab_size={num_rows} is too small for {size} ranks to have a row each")


def _sizes(model: CausalLM) -> Iterator[tuple[str, str, int]]:
    """Path, key in config.json and number of what must divide."""
    for path, module in model.named_modules():
        if isinstance(module, Attention):
            num_heads = num_inputs(module.o_proj) // module.head_dim
            yield path, "num_attention_heads", num_heads
            yield path, "num_key_value_heads", num_heads // module.heads_per_kv_head
        elif isinstance(module, LatentAttention):
            yield path, "num_attention_heads", num_inputs(module.o_proj) // module.value_dim
        elif isinstance(module, FeedForward | PlainFeedForward):
            yield path, "intermediate_size", num_inputs(module.down_proj)
        elif isinstance(module, Experts):
            yield path, "intermediate_size", module.intermediate_size


def _check_parts(model: CausalLM, problems: Problems) -> None:
    """One problem for each kind of module that can't be split; a family from outside may have such."""
    unknown: dict[type[nn.Module], str] = {}
    for path, module in model.model.layers.named_modules():
        is_unknown = path.count(".") == 1 and not isinstance(module, BLOCKS + NORMS)
        if is_unknown or (isinstance(module, Attention) and not _norms_are_known(module)):
            unknown.setdefault(type(module), path)
    for kind, path in unknown.items():
        problems.add(KEY, f"'{path}' of the layers, a {kind.__name__}, can't be split: its parts are not known")


def _norms_are_known(attention: Attention) -> bool:
    if attention.norm_at is None:
        return True
    kinds = RMSNorm if attention.norm_at == "flat" else NORMS
    return isinstance(attention.q_norm, kinds) and isinstance(attention.k_norm, kinds)


def _takes_vocabulary(loss: Callable[..., object]) -> bool:
    options = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters.values()
    return any(option.name == "vocabulary" or option.kind is option.VAR_KEYWORD for option in options)


def _name(loss: Callable[..., object]) -> str:
    named = loss if inspect.isfunction(loss) else type(loss)
    return f"{named.__module__}.{named.__qualname__}"
