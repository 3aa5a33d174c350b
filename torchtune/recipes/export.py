"""Export: a checkpoint with its adapters merged, as a complete folder, a GGUF file or a program of torch.export.

    tune run export model_checkpoint=SmolLM2-135M-Instruct adapter=runs/mine/step_100 output_dir=merged
    tune run export adapter=runs/mine/step_100 output_dir=merged dtype=bf16
    tune run export adapter=runs/mine/step_100 output_dir=merged format=gguf gguf_type=q8_0
    tune run export adapter=runs/mine/step_100 output_dir=merged format=pt2

Without `model_checkpoint` the base is the one that the adapter names. Several adapters are merged one after another;
with `adapter_weights` their weighted sum is. One weight is in memory at a time beside the model's layout; of a program
all are.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from torchtune.adapters.combine import combine_adapters
from torchtune.checkpoint.card import Run, write_card
from torchtune.checkpoint.gguf_write import plan_gguf
from torchtune.checkpoint.hub import resolve
from torchtune.checkpoint.peft_write import save_adapter
from torchtune.checkpoint.program import trace_program, write_program
from torchtune.checkpoint.save import save_model, save_rest, save_text_files
from torchtune.config.parse import parse_params
from torchtune.config.strict import STRICT
from torchtune.recipes.adapted import AdaptedCheckpoint, Quantization
from torchtune.recipes.adapters import base_name, tell_carried_path, tell_local_base
from torchtune.recipes.output_folder import output_folder, written_whole
from torchtune.training.precision import get_dtype
from torchtune.training.progress import say

POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}  # of a thousand


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
    format: Literal["safetensors", "gguf", "pt2"] = Field(
        default="safetensors",
        description="A Hugging Face folder; a file for llama.cpp, OUT/OUT-Q8_0.gguf; torch.export's, OUT/model.pt2.",
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = Field(
        default="auto", description="Type of the weights in safetensors and pt2; auto: the base's."
    )
    gguf_type: Literal["auto", "f32", "f16", "bf16", "q8_0", "q5_0", "q5_1", "q4_0", "q4_1"] = Field(
        default="auto",
        description="Type of the matrices in a GGUF file; norms and biases are f32. auto: the base's, not quantised.",
    )
    max_shard_size: int | str | None = Field(
        default=None, description="Most bytes of a safetensors file, like 5GB; by default as the base is split, or 5GB."
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
        if self.format != "safetensors":
            problems += self._not_for_one_file()
        if self.format != "gguf" and self.gguf_type != "auto":
            problems.append(f"gguf_type: {self.gguf_type} is a type of GGUF files; add format=gguf, or use dtype")
        if self.max_shard_size is not None:
            try:
                num_bytes(self.max_shard_size)
            except ValueError as error:
                problems.append(f"max_shard_size: {error}")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _not_for_one_file(self) -> list[str]:
        problems = []
        if self.format == "gguf" and self.dtype != "auto":
            problems.append(f"dtype: {self.dtype} is a type of safetensors; the type of a GGUF file is gguf_type")
        if self.max_shard_size is not None:
            problems.append(f"max_shard_size: a {self.format.upper()} file is written whole")
        if not self.merge:
            kind = self.format
            problems.append(
                f"merge: an adapter is not written as {kind.upper()}; leave merge=false out, or format={kind}"
            )
        return problems

    @property
    def adapters(self) -> list[str]:
        """`adapter` as a list."""
        return [self.adapter] if isinstance(self.adapter, str) else self.adapter


def check(params: ExportParams) -> None:
    """Compare the params with what lies on disk; no weight of the base is read.

    Raises:
        ConfigError, CheckpointError: an output that is there, a base that can't be found, an adapter for another base.
    """
    ExportRecipe(params).setup(params)


class ExportRecipe:
    """Writes a checkpoint. The order: `__init__`, `setup`, `export`."""

    def __init__(self, params: ExportParams) -> None:
        self._params = params
        self._output = output_folder(params.output_dir)
        self._dtype = None if params.dtype == "auto" else get_dtype(params.dtype)

    def setup(self, params: ExportParams) -> None:
        """Open the base and read the adapters; compare them."""
        self._base = AdaptedCheckpoint.open(
            params.model_checkpoint,
            params.adapters,
            weights=params.adapter_weights,
            quantization=params.base_quantization,
        )
        if not params.merge and len(self._base.adapters) > 1:
            self._base.adapters = [combine_adapters(self._base.adapters, [1.0] * len(self._base.adapters))]
        if params.format == "gguf":
            kind = None if params.gguf_type == "auto" else params.gguf_type
            self._plan = plan_gguf(self._base.checkpoint, self._base.model, kind=kind, name=self._output.name)
            for note in self._plan.notes:
                say(note)
        if params.format == "pt2":
            checkpoint = self._base.checkpoint
            self._program = trace_program(checkpoint.config, self._dtype or checkpoint.held_dtype)

    def export(self) -> Path:
        """Write the folder, whole or not at all; returns it.

        Raises:
            CheckpointError: it can't be written, or a value is beyond what `dtype` holds.
        """
        with written_whole(self._output) as folder:
            self._write(folder)
        say(f"{self._params.output_dir}: written")
        return self._output

    def _write(self, folder: Path) -> None:
        checkpoint, model = self._base.checkpoint, self._base.model
        if not self._params.merge:
            tell_local_base(checkpoint)
            save_adapter(folder, replace(self._base.adapters[0], base=base_name(checkpoint)), model)
            save_text_files(folder, checkpoint)
            self._write_card(folder)
            return
        if self._params.format == "gguf":
            folder.mkdir(parents=True)
            file = folder / f"{self._output.name}-{self._plan.kind.name.upper()}.gguf"
            self._plan.write(file, model, self._base.values())
            return
        tell_carried_path(checkpoint)
        if self._params.format == "pt2":
            folder.mkdir(parents=True)
            write_program(self._program, folder / "model.pt2", self._base.values())
            save_rest(folder, checkpoint, self._dtype)
            return
        largest = None if self._params.max_shard_size is None else num_bytes(self._params.max_shard_size)
        values = self._base.values()
        save_model(folder, model, checkpoint, dtype=self._dtype, max_shard_bytes=largest, values=values)
        self._write_card(folder)

    def _write_card(self, folder: Path) -> None:
        """A model card, where a run of ours made what is exported."""
        params = self._params
        last = params.adapters[-1] if params.adapters else params.model_checkpoint
        run = Run.beside(resolve(last)) if last is not None else None
        if run is not None:
            write_card(
                folder,
                name=self._output.name,
                base=self._base.checkpoint.source,
                adapters=params.adapters,
                run=run,
                is_adapter=not params.merge,
            )


def num_bytes(size: int | str) -> int:
    """A size as it is written: 5GB, 200MB, or a number of bytes.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", str(size).strip(), re.IGNORECASE)
    found = 0 if match is None else int(float(match[1]) * (1024 if match[3] else 1000) ** POWERS[match[2].upper()])
    if found < 1:
        raise ValueError(f"{size!r} is no size; 5GB, 200MB or a number of bytes is")
    return found


def main() -> None:
    """The recipe as a program: `tune run export key=value ...`."""
    params = parse_params(ExportParams)
    recipe = ExportRecipe(params)
    recipe.setup(params)
    recipe.export()


if __name__ == "__main__":
    main()
