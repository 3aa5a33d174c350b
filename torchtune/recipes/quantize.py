"""Quantise: a checkpoint with its adapters merged, its linear layers in 8 or 4 bits, as a complete folder.

    tune run quantize model_checkpoint=SmolLM2-135M-Instruct output_dir=smaller kind=int8
    tune run quantize adapter=runs/mine/step_100 output_dir=smaller kind=int4 dataset=held_out.jsonl

`transformers` reads the folder, through compressed-tensors or bitsandbytes, and so does every recipe here. With
`dataset` the loss on it is measured before and after, the second time on the folder as it was written. One weight is
in memory at a time beside the model's layout. docs/quantization.md says what each kind costs and who reads it.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from torchtune.checkpoint.save import save_model
from torchtune.config.parse import parse_params
from torchtune.config.strict import STRICT
from torchtune.data.options import DatasetOptions
from torchtune.distributed.process_group import process_group
from torchtune.errors import ConfigError
from torchtune.quantization.encoding import encoding_of
from torchtune.quantization.schemes import scheme_of
from torchtune.recipes.adapted import AdaptedCheckpoint
from torchtune.recipes.adapters import tell_carried_path
from torchtune.recipes.evaluate import EvaluateParams, EvaluateRecipe
from torchtune.recipes.inference import ModelParams
from torchtune.recipes.output_folder import output_folder, written_whole
from torchtune.recipes.params import Count
from torchtune.training.progress import say


@dataclass(config=STRICT, kw_only=True)
class QuantizeParams(ModelParams):
    """All keys of this recipe."""

    output_dir: str = Field(description="Where the folder goes; it must not exist, or be empty.")
    kind: str = Field(
        description="int8, int4, fp8 or nf4: weights alone; int8_dynamic, fp8_dynamic: what goes into a layer as well.",
    )
    group_size: Count | None = Field(
        default=None, description="int4, int8: weights that share a scale; by default 64 for int4, a row for int8."
    )
    double_quantization: bool = Field(default=True, description="nf4: quantise the blocks' scales too.")
    quantize_head: bool = Field(default=False, description="The output layer too, where it is not the embedding.")
    dataset: DatasetOptions | None = Field(default=None, description="Data to measure the loss on, before and after.")
    max_seq_len: Count | None = Field(default=None, description="Tokens of its rows at most; by default the context.")

    @model_validator(mode="after")
    def _has_a_scheme(self) -> QuantizeParams:
        scheme_of(self.kind, group_size=self.group_size)
        return self


def check(params: QuantizeParams) -> None:
    """Compare the params with what lies on disk; no weight of the base is read.

    Raises:
        ConfigError, CheckpointError, UnsupportedError: an output that is there, a base that can't be found or quantised.
    """
    QuantizeRecipe(params).setup(params)


class QuantizeRecipe:
    """Writes a quantised checkpoint. The order: `__init__`, `setup`, `quantize`."""

    def __init__(self, params: QuantizeParams) -> None:
        self._params = params
        self._output = output_folder(params.output_dir)
        self._scheme = scheme_of(
            params.kind, group_size=params.group_size, double_quantization=params.double_quantization
        )

    def setup(self, params: QuantizeParams) -> None:
        """Open base, adapters and data; decide what is quantised, and whether it can be.

        Raises:
            ConfigError, CheckpointError, UnsupportedError: as `check`.
            MissingDependencyError: the kind's library is not installed.
        """
        self._base = AdaptedCheckpoint.open(
            params.model_checkpoint, params.adapters, quantization=params.base_quantization
        )
        if self._base.checkpoint.config.get("quantization_config"):
            # Rounding twice loses more than once, and nobody would see it.
            raise ConfigError(
                f"{self._base.checkpoint.source} is quantised already; give the checkpoint that it was made from",
                key="model_checkpoint",
            )
        self._scheme.need_library("kind")
        self._encoding = encoding_of(self._base.model, self._scheme, head=params.quantize_head)
        if params.dataset is not None:
            self._before = self._evaluation(params.model_checkpoint, params.adapters)

    def quantize(self) -> dict[str, Any]:
        """Write the folder, whole or not at all; returns its size, and the losses that were asked for.

        Raises:
            CheckpointError: a weight is not finite, or the folder can't be written.
        """
        checkpoint = self._base.checkpoint
        tell_carried_path(checkpoint)
        found: dict[str, Any] = {"kind": self._scheme.kind, "num_layers": len(self._encoding.names)}
        if self._params.dataset is not None:
            found["loss_before"] = self._before.evaluate()["dataset"]["loss"]
        with written_whole(self._output) as folder:
            save_model(folder, self._base.model, checkpoint, values=self._base.values(), encoding=self._encoding)
        found["bytes"] = sum(file.stat().st_size for file in self._output.glob("*.safetensors"))
        if self._params.dataset is not None:
            found["loss_after"] = self._evaluation(str(self._output), []).evaluate()["dataset"]["loss"]
        return found

    def _evaluation(self, model_checkpoint: str | None, adapters: list[str]) -> EvaluateRecipe:
        """What measures the loss of a model on the data."""
        params = self._params
        evaluated = EvaluateParams(
            model_checkpoint=model_checkpoint,
            adapter=adapters,
            base_quantization=params.base_quantization,
            dtype=params.dtype,
            device=params.device,
            dataset=params.dataset,
            max_seq_len=params.max_seq_len,
        )
        recipe = EvaluateRecipe(evaluated)
        recipe.setup(evaluated)
        return recipe


def main() -> None:
    """The recipe as a program: `tune run quantize key=value ...`."""
    params = parse_params(QuantizeParams)
    with process_group(params.device):
        recipe = QuantizeRecipe(params)
        recipe.setup(params)
        found = recipe.quantize()
    say(
        f"{params.output_dir}: {found['num_layers']} layers in {found['kind']}, {found['bytes'] / 1e6:.1f} MB of weights"
    )
    if "loss_after" in found:
        before, after = found["loss_before"], found["loss_after"]
        say(f"loss {before:.4f} before, {after:.4f} after ({(after - before) / before:+.2%})")


if __name__ == "__main__":
    main()
