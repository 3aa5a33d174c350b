"""Export: a checkpoint with its adapters merged, in the type that you ask for, as a complete folder.

    tune run export model_checkpoint=SmolLM2-135M-Instruct adapter=runs/mine/step_100 output_dir=merged
    tune run export adapter=runs/mine/step_100 output_dir=merged dtype=bf16

Without `model_checkpoint` the base is the one that the adapter names. Several adapters are merged one after another;
with `adapter_weights` their weighted sum is. One weight is in memory at a time beside the model's layout.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from torchtune.adapters.combine import combine_adapters
from torchtune.checkpoint.peft_write import save_adapter
from torchtune.checkpoint.save import save_model, save_text_files
from torchtune.config.parse import parse_params
from torchtune.config.strict import STRICT
from torchtune.recipes.adapted import AdaptedCheckpoint, Quantization
from torchtune.recipes.adapters import base_name, tell_carried_path, tell_local_base
from torchtune.recipes.output_folder import output_folder, written_whole
from torchtune.training.precision import get_dtype
from torchtune.training.progress import say


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
        self._output = output_folder(params.output_dir)

    def setup(self) -> None:
        """Open the base and read the adapters; compare them."""
        params = self._params
        self._base = AdaptedCheckpoint.open(
            params.model_checkpoint,
            params.adapters,
            weights=params.adapter_weights,
            quantization=params.base_quantization,
        )
        if not params.merge and len(self._base.adapters) > 1:
            self._base.adapters = [combine_adapters(self._base.adapters, [1.0] * len(self._base.adapters))]

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
            return
        tell_carried_path(checkpoint)
        dtype = None if self._params.dtype == "auto" else get_dtype(self._params.dtype)
        save_model(folder, model, checkpoint, dtype=dtype, values=self._base.values())


def main() -> None:
    """The recipe as a program: `tune run export key=value ...`."""
    recipe = ExportRecipe(parse_params(ExportParams))
    recipe.setup()
    recipe.export()


if __name__ == "__main__":
    main()
