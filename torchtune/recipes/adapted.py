"""A checkpoint with adapters on it: opened and compared, then merged the way that the adapters were trained.

Export, generation and evaluation start from it. Without adapters it is the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from torchtune.adapters.adapter import Adapter, fill, split_pissa
from torchtune.adapters.base_weights import BaseWeights
from torchtune.adapters.combine import combine_adapters
from torchtune.adapters.init import allocate_lora
from torchtune.adapters.lora import apply_lora
from torchtune.adapters.merge import MergedWeights
from torchtune.checkpoint.headers import read_json
from torchtune.checkpoint.hub import resolve
from torchtune.checkpoint.open import Checkpoint, open_checkpoint, text_files
from torchtune.checkpoint.peft_names import CONFIG as ADAPTER_CONFIG
from torchtune.checkpoint.peft_read import read_adapter, read_adapter_config
from torchtune.checkpoint.quantized import QuantizedWeights
from torchtune.checkpoint.training_state import run_params
from torchtune.checkpoint.vocabulary import grow_vocabulary
from torchtune.errors import CheckpointError, ConfigError
from torchtune.models.build import build_model
from torchtune.modules.decoder import CausalLM
from torchtune.quantization.activations import apply_activation_rounding
from torchtune.quantization.kinds import packable, packer
from torchtune.recipes.adapters import compare_bases
from torchtune.training.progress import say

Quantization = Literal["auto", "none", "nf4", "int8", "int4"]
# From a parameter's name and what the model holds, on the meta device, what is merged.
Values = Callable[[str, Tensor], Tensor]


@dataclass
class AdaptedCheckpoint:
    """A base and what stands on it; headers and adapters are read, no weight of the base.

    Attributes:
        checkpoint: the base, with the vocabulary, tokenizer and template that the last adapter was trained with.
        model: the base's, on the meta device.
        adapters: in the order in which they are merged.
        run: what the run that trained the last adapter was told, where it lies beside it.
        quantization: what the base was when the last adapter was trained.
    """

    checkpoint: Checkpoint
    model: CausalLM
    adapters: list[Adapter] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)
    quantization: str = "none"

    @classmethod
    def open(
        cls,
        model_checkpoint: str | None,
        adapters: Sequence[str] = (),
        *,
        weights: Sequence[float] | None = None,
        quantization: Quantization = "auto",
    ) -> AdaptedCheckpoint:
        """Open the base and read the adapters; compare them.

        Args:
            model_checkpoint: folder, GGUF file or hub id; by default the base that the first adapter names. A folder
                that holds an adapter and no model is that adapter.
            adapters: folders or hub ids.
            weights: of each adapter, whose sum is then the only one.
            quantization: of the base that the last adapter was trained over; auto: as its run says.
        Raises:
            ConfigError, CheckpointError: a base that can't be found, an adapter for another base.
        """
        if model_checkpoint is not None and _is_adapter(model_checkpoint):
            adapters, model_checkpoint = [model_checkpoint, *adapters], None
        if model_checkpoint is None and not adapters:
            raise ConfigError("neither it nor an adapter is given", key="model_checkpoint")
        source = model_checkpoint or named_base(adapters[0])
        run = run_params(resolve(adapters[-1])) if adapters else {}
        checkpoint = _open_base(source, adapters, run)
        with torch.device("meta"):
            model: CausalLM = build_model(checkpoint.config)
        read = [read_adapter(path, model) for path in adapters]
        for path, adapter in zip(adapters, read, strict=True):
            compare_bases(path, adapter, source, checkpoint.config)
        checkpoint.check(model)
        if weights is not None:
            read = [combine_adapters(read, weights)]
        made = cls(checkpoint, model, read, run)
        if read:
            made.quantization = made._trained_over(quantization, weighted=weights is not None)
        return made

    def values(self) -> Values:
        """Reads what the base has under a name in the model, with the adapters merged; call it once."""
        return self._merged() if self.adapters else self._stored()

    def load(self, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> CausalLM:
        """A model with these weights, merged in float32 and rounded once.

        Raises:
            CheckpointError: a file is cut or damaged.
        """
        with torch.device("meta"):
            model: CausalLM = build_model(self.checkpoint.config)
        if not self.adapters:
            self.checkpoint.load_into(model, device=device, param_dtype=dtype)
        else:
            values = self.values()

            def place(name: str, stored: Tensor) -> Tensor:
                return values(name, stored).to(dtype=dtype, device=device)

            self.checkpoint.load_into(model, device=device, place=place)
        weights = self.checkpoint.weights
        if isinstance(weights, QuantizedWeights):
            apply_activation_rounding(model, weights.scheme, weights.layers_of(model))
        return model.eval()

    def takes_part_out(self) -> bool:
        """Whether what was quantised is the base less the adapter's beginning."""
        return bool(self.run.get("lora_init") == "pissa")

    def _trained_over(self, asked: Quantization, *, weighted: bool) -> str:
        if asked != "auto":
            return asked
        kind = str(self.run.get("base_quantization", "none"))
        if kind != "none" and self.takes_part_out() and weighted:
            say(f"each adapter has a base of its own in {kind} (PiSSA), so their sum is merged into the base as stored")
            return "none"
        if kind != "none":
            say(
                f"the adapter was trained over a base in {kind}, so it is merged into that; base_quantization says otherwise"
            )
        below = self.run.get("frozen_adapters") or []
        if below and len(self.adapters) == 1:
            say(
                f"the adapter was trained over other adapters: {', '.join(below)}; name them before it to have them too"
            )
        return kind

    def _stored(self) -> Values:
        read = self.checkpoint.reader(self.model)
        return lambda name, held: read(name)

    def _merged(self) -> Values:
        """By the way that the run that trained the last adapter went."""
        *frozen, last = self.adapters
        model, stored = self.model, self._stored()
        apply_lora(model, last.config, is_given=True)
        allocate_lora(model, device="cpu", dtype=torch.float32)
        quantised = self.quantization != "none"
        fill(model, last)
        if quantised and self.takes_part_out():
            split_pissa(model)
        double, packed = bool(self.run.get("double_quantization", True)), packable(model) if quantised else []
        base = BaseWeights(
            model,
            dtype=torch.float32,
            trained_dtype=torch.float32,
            frozen=frozen,
            pack=packer(self.quantization, double_quantization=double) if quantised else None,
            packable=packed,
            whole=last.whole,
        )
        merged = MergedWeights(model, last.config, base, lambda name: stored(name, model.get_parameter(name)))
        trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

        def value(name: str, held: Tensor) -> Tensor:
            if name not in trained:
                return stored(name, held)
            return merged(name, base(name, stored(name, held)) if name in packed or trained[name] else held)

        return value


def named_base(adapter: str) -> str:
    """The base that an adapter names.

    Raises:
        ConfigError: it names none, or one that can't be found.
    """
    named = read_adapter_config(resolve(adapter)).get("base_model_name_or_path")
    if not named:
        raise ConfigError(f"{adapter} does not say what its base is; name it", key="model_checkpoint")
    try:
        resolve(str(named), weights=False)
    except CheckpointError as error:
        raise ConfigError(f"name the base; what {adapter} says: {error}", key="model_checkpoint") from error
    return str(named)


def _is_adapter(source: str) -> bool:
    folder = resolve(source, weights=False)
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def _open_base(source: str, adapters: Sequence[str], run: dict[str, Any]) -> Checkpoint:
    checkpoint = open_checkpoint(source)
    new_tokens, multiple = run.get("new_tokens") or [], run.get("pad_vocab_to_multiple_of")
    if new_tokens or multiple:
        checkpoint = grow_vocabulary(checkpoint, new_tokens, pad_to_multiple_of=multiple)
    if adapters:
        folder = resolve(adapters[-1])
        checkpoint.files.update(text_files(folder))
        if (folder / "generation_config.json").exists():
            checkpoint.generation_config = read_json(folder / "generation_config.json")
    return checkpoint
