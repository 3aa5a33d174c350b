"""Export: a checkpoint with its adapters merged, in the type that you ask for, as a complete folder.

    tune run export model_checkpoint=SmolLM2-135M-Instruct adapter=runs/mine/step_100 output_dir=merged
    tune run export adapter=runs/mine/step_100 output_dir=merged dtype=bf16

Without `model_checkpoint` the base is the one that the adapter names. Several adapters are merged one after another;
with `adapter_weights` their weighted sum is. One weight is in memory at a time beside the model's layout.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
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
from torchtune.checkpoint.peft_read import read_adapter, read_adapter_config
from torchtune.checkpoint.peft_write import save_adapter
from torchtune.checkpoint.save import save_model, save_text_files
from torchtune.checkpoint.training_state import run_params
from torchtune.checkpoint.vocabulary import grow_vocabulary
from torchtune.config.parse import parse_params
from torchtune.config.strict import STRICT
from torchtune.errors import CheckpointError, ConfigError
from torchtune.models.build import build_model
from torchtune.modules.decoder import CausalLM
from torchtune.quantization.kinds import packable, packer
from torchtune.recipes.adapters import base_name, tell_carried_path, tell_local_base, warn_of_other_base
from torchtune.training.precision import get_dtype
from torchtune.training.progress import say

Quantization = Literal["auto", "none", "nf4", "int8", "int4"]
# From a parameter's name and what the model holds, on the meta device, what is written.
Values = Callable[[str, Tensor], Tensor]


@dataclass(config=STRICT, kw_only=True)
class ExportParams:
    """All keys of this recipe."""

    model_checkpoint: str | None = Field(
        default=None, description="Base: folder, GGUF file or hub id; by default the one that the adapter names."
    )
    adapter: str | list[str] = Field(
        default_factory=list, description="PEFT adapters, folders or hub ids, merged in this order."
    )
    adapter_weights: list[float] | None = Field(
        default=None, description="Merge the adapters' weighted sum, one weight for each: [0.5, 0.5] is their mean."
    )
    output_dir: str = Field(description="Where the folder goes; it must not exist, or be empty.")
    dtype: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = Field(
        default="auto", description="Type of the weights written; auto: the base's."
    )
    base_quantization: Quantization = Field(
        default="auto",
        description="What the adapter was trained over; it is merged into that. auto: as its run says, else none.",
    )
    merge: bool = Field(default=True, description="false writes the adapters' sum as an adapter, and no base.")

    @model_validator(mode="after")
    def _holds(self) -> ExportParams:
        """Pairs of values that can't both be meant."""
        problems = []
        if not self.adapters and self.model_checkpoint is None:
            problems.append("model_checkpoint: neither it nor an adapter is given; there is nothing to export")
        if self.adapter_weights is not None and len(self.adapter_weights) != len(self.adapters):
            problems.append(
                f"adapter_weights: {len(self.adapter_weights)} weights for {len(self.adapters)} adapters; one for each"
            )
        if not self.merge and not self.adapters:
            problems.append("merge: false writes an adapter, and none is given")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def adapters(self) -> list[str]:
        """`adapter` as a list."""
        return [self.adapter] if isinstance(self.adapter, str) else self.adapter


def check(params: ExportParams) -> None:
    """Compare the params with what lies on disk; no weight of the base is read.

    Raises:
        ConfigError, CheckpointError: an output that is there, a base that can't be found, an adapter for another base.
    """
    ExportRecipe(params).setup()


class ExportRecipe:
    """Writes a checkpoint. The order: `__init__`, `setup`, `export`."""

    def __init__(self, params: ExportParams) -> None:
        self._params = params
        self._output = Path(params.output_dir).absolute()
        if self._output == Path.cwd():
            raise ConfigError("the folder that you are in can't be replaced; name another", key="output_dir")
        if self._output.exists() and (not self._output.is_dir() or any(self._output.iterdir())):
            raise ConfigError(f"{self._output} is there and not empty; name another folder", key="output_dir")

    def setup(self) -> None:
        """Open the base and read the adapters; compare them."""
        params = self._params
        source = params.model_checkpoint or self._named_base(params.adapters[0])
        # What the run that trained the last adapter was told, where it lies beside it.
        self._run: dict[str, Any] = run_params(resolve(params.adapters[-1])) if params.adapters else {}
        self._checkpoint = self._open_base(source)
        with torch.device("meta"):
            self._model: CausalLM = build_model(self._checkpoint.config)
        self._adapters = [self._read(path, source) for path in params.adapters]
        self._checkpoint.check(self._model)
        if params.adapter_weights is not None:
            self._adapters = [combine_adapters(self._adapters, params.adapter_weights)]
        elif not params.merge and len(self._adapters) > 1:
            self._adapters = [combine_adapters(self._adapters, [1.0] * len(self._adapters))]
        self._quantization = self._trained_over()

    def export(self) -> Path:
        """Write the folder, whole or not at all; returns it.

        Raises:
            CheckpointError: it can't be written, or a value is beyond what `dtype` holds.
        """
        beside = self._output.with_name(f".{self._output.name}.writing")
        shutil.rmtree(beside, ignore_errors=True)
        try:
            self._write(beside)
            _let_others_read(beside)
            if self._output.exists():
                self._output.rmdir()
            beside.rename(self._output)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"can't be written: {error}", path=self._output) from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        say(f"{self._params.output_dir}: written")
        return self._output

    def _named_base(self, adapter: str) -> str:
        named = read_adapter_config(resolve(adapter)).get("base_model_name_or_path")
        if not named:
            raise ConfigError(f"{adapter} does not say what its base is; name it", key="model_checkpoint")
        try:
            resolve(str(named), weights=False)
        except CheckpointError as error:
            raise ConfigError(f"name the base; what {adapter} says: {error}", key="model_checkpoint") from error
        return str(named)

    def _open_base(self, source: str) -> Checkpoint:
        """The base, with the vocabulary, tokenizer and template that the last adapter was trained with."""
        checkpoint, run = open_checkpoint(source), self._run
        new_tokens, multiple = run.get("new_tokens") or [], run.get("pad_vocab_to_multiple_of")
        if new_tokens or multiple:
            checkpoint = grow_vocabulary(checkpoint, new_tokens, pad_to_multiple_of=multiple)
        if self._params.adapters:
            folder = resolve(self._params.adapters[-1])
            checkpoint.files.update(text_files(folder))
            if (folder / "generation_config.json").exists():
                checkpoint.generation_config = read_json(folder / "generation_config.json")
        return checkpoint

    def _read(self, path: str, base: str) -> Adapter:
        adapter = read_adapter(path, self._model)
        warn_of_other_base(path, adapter, base)
        return adapter

    def _trained_over(self) -> str:
        """What the base was quantised to when the last adapter was trained."""
        if self._params.base_quantization != "auto":
            return self._params.base_quantization
        kind = str(self._run.get("base_quantization", "none"))
        if kind != "none" and self._takes_part_out() and self._params.adapter_weights is not None:
            say(f"each adapter has a base of its own in {kind} (PiSSA), so their sum is merged into the base as stored")
            return "none"
        if kind != "none":
            say(
                f"the adapter was trained over a base in {kind}, so it is merged into that; base_quantization says otherwise"
            )
        below = self._run.get("frozen_adapters") or []
        if below and len(self._params.adapters) == 1:
            say(
                f"the adapter was trained over other adapters: {', '.join(below)}; name them before it to have them too"
            )
        return kind

    def _takes_part_out(self) -> bool:
        """Whether what was quantised is the base less the adapter's beginning."""
        return self._run.get("lora_init") == "pissa"

    def _write(self, folder: Path) -> None:
        if not self._params.merge:
            tell_local_base(self._checkpoint)
            save_adapter(folder, replace(self._adapters[0], base=base_name(self._checkpoint)), self._model)
            save_text_files(folder, self._checkpoint)
            return
        tell_carried_path(self._checkpoint)
        dtype = None if self._params.dtype == "auto" else get_dtype(self._params.dtype)
        values = self._merged() if self._adapters else self._stored()
        save_model(folder, self._model, self._checkpoint, dtype=dtype, values=values)

    def _stored(self) -> Values:
        """Reads what the base has under a name in the model."""
        read = self._checkpoint.reader(self._model)
        return lambda name, held: read(name)

    def _merged(self) -> Values:
        """Reads it and merges the adapters, by the way that the run that trained the last one went."""
        *frozen, last = self._adapters
        model, stored = self._model, self._stored()
        apply_lora(model, last.config, is_given=True)
        allocate_lora(model, device="cpu", dtype=torch.float32)
        quantised = self._quantization != "none"
        fill(model, last)
        if quantised and self._takes_part_out():
            split_pissa(model)
        double, packed = bool(self._run.get("double_quantization", True)), packable(model) if quantised else []
        base = BaseWeights(
            model,
            dtype=torch.float32,
            trained_dtype=torch.float32,
            frozen=frozen,
            pack=packer(self._quantization, double_quantization=double) if quantised else None,
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


def _let_others_read(folder: Path) -> None:
    """safetensors makes files that their owner alone can read."""
    readers = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(readers)


def main() -> None:
    """The recipe as a program: `tune run export key=value ...`."""
    recipe = ExportRecipe(parse_params(ExportParams))
    recipe.setup()
    recipe.export()


if __name__ == "__main__":
    main()
