"""Adapters of ours and PEFT's over one random base: what the tests of this folder share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from tests.models.oracle import assert_close, auto_class
from torchtune.adapters.adapter import Adapter, adapter_of, fill
from torchtune.adapters.base_weights import BaseWeights
from torchtune.adapters.config import LoRAConfig
from torchtune.adapters.init import allocate_lora, init_lora
from torchtune.adapters.lora import apply_lora
from torchtune.adapters.merge import MergedWeights
from torchtune.checkpoint.open import Checkpoint, open_checkpoint
from torchtune.checkpoint.peft_read import read_adapter
from torchtune.checkpoint.peft_write import save_adapter
from torchtune.checkpoint.save import save_model
from torchtune.models.build import build_model
from torchtune.modules.decoder import CausalLM


@dataclass
class Adapted:
    """A loaded model with its update layers, and what it was made of."""

    model: CausalLM
    config: LoRAConfig
    checkpoint: Checkpoint
    base: BaseWeights

    def save(self, folder: Path) -> Path:
        """Write the adapter."""
        save_adapter(folder, adapter_of(self.model, self.config, base=self.checkpoint.source), self.model)
        return folder

    def save_merged(self, folder: Path, *, dtype: torch.dtype | None = None) -> Path:
        """Write the whole model."""
        values = MergedWeights(self.model, self.config, self.base, self.checkpoint.reader(self.model))
        save_model(folder, self.model, self.checkpoint, values=values, dtype=dtype)
        return folder


def meta_model(base: Path) -> CausalLM:
    """The base's model without weights, its names as they are in the folder."""
    checkpoint = open_checkpoint(base)
    with torch.device("meta"):
        model = build_model(checkpoint.config)
    checkpoint.check(model)
    return model


def adapted(
    base: Path,
    config: LoRAConfig | None = None,
    *,
    adapter: Path | Adapter | None = None,
    resumed: Path | None = None,
    frozen: Sequence[Adapter] = (),
    quantisation: tuple[Callable[[Tensor], Tensor], Callable[[CausalLM], Collection[str]]] | None = None,
    seed: int = 0,
) -> Adapted:
    """The base with a fresh adapter, or with one that is given: by the recipe's steps, in its order.

    Args:
        adapter: what is gone on from.
        resumed: the same run's own adapter.
        quantisation: what packs a weight, and what names those that are packed.
    """
    checkpoint = open_checkpoint(base)
    with torch.device("meta"):
        model = build_model(checkpoint.config)
    checkpoint.check(model)
    start = read_adapter(adapter, model) if isinstance(adapter, Path) else adapter
    config = start.config if start is not None else config or LoRAConfig(rank=4, alpha=6.0)
    apply_lora(model, config, is_given=start is not None)
    allocate_lora(model, device="cpu", dtype=torch.float32)
    torch.manual_seed(seed)
    init_lora(model, config.init)
    if resumed is not None:
        start = read_adapter(resumed, model)
    if start is not None:
        fill(model, start, init=config.init)
    weights = BaseWeights(
        model,
        dtype=torch.float32,
        trained_dtype=torch.float32,
        frozen=frozen,
        pack=None if quantisation is None else quantisation[0],
        packable=() if quantisation is None else quantisation[1](model),
        whole=start.whole if start is not None else {},
        fresh=None if start is not None else config.init,
    )
    checkpoint.load_into(model, place=weights)
    return Adapted(model, config, checkpoint, weights)


def trained_parameters(model: Any) -> dict[str, Tensor]:
    """Those that an optimizer gets, of a model of either side."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def disturb(model: Any, *, std: float = 0.2, seed: int = 1) -> None:
    """Move all that is trained as training would: a fresh B of zeros would hide what is computed with it."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained_parameters(model).values():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(noise * std * (parameter.abs().mean() if parameter.dim() == 1 else 1.0))


def load_theirs(folder: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model of a folder."""
    config = open_checkpoint(folder).config
    from transformers import AutoConfig  # the text part of some comes by another class

    kind = auto_class(AutoConfig.for_model(config["model_type"]))
    return kind.from_pretrained(folder, attn_implementation="eager", dtype=dtype).eval()


def load_peft(base: Path, adapter: Path, **options: Any) -> Any:
    """PEFT's model of the base with an adapter, once it is sure that every tensor of the file has found its place."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(load_theirs(base), adapter, **options).eval()
    unfit = [str(one.message) for one in said if "adapter keys" in str(one.message)]
    assert not unfit, unfit[0]
    assert own_keys(get_peft_model_state_dict(model)) == own_keys(load_file(adapter / "adapter_model.safetensors"))
    return model


def own_keys(tensors: Collection[str]) -> set[str]:
    """Without PEFT's copies of adapted embeddings and heads."""
    return {name for name in tensors if not name.endswith(".base_layer.weight")}


def token_ids(*shape: int, seed: int = 2) -> Tensor:
    """Random ids of the small vocabulary."""
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def check_same_logits(one: Any, other: Any, *, share: float = 1e-5, what: str = "logits") -> Tensor:
    """Of two models, of whichever side, within `share` of their maximum; returns them."""
    ids = token_ids(2, 21)
    found, expected = (getattr(out, "logits", out) for out in (one(ids), other(ids)))
    assert_close(found, expected, share, what)
    return expected
