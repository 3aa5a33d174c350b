"""Pipeline: fine-tune, evaluate, quantise and export, several stages in one script; a file to copy and change.

    tune run pipeline
    tune run pipeline output_dir=runs/mine finetune.model_checkpoint=SmolLM2-135M-Instruct finetune.dataset=chats.jsonl
        evaluate.dataset=held_out.jsonl quantize.kind=int4 export.gguf_type=q4_0

Each stage is a recipe with its own keys, under the stage's name. By default the model and rows are the quickstart's.
What comes out: OUT/finetuned, OUT/quantized, OUT/exported, and in OUT/results.json the loss of each on the same rows.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from torchtune.checkpoint.steps import newest_step
from torchtune.config.parse import parse_params
from torchtune.config.strict import STRICT
from torchtune.data.options import DatasetOptions
from torchtune.distributed.process_group import is_main, process_group
from torchtune.recipes import evaluate, export, full_finetune, quantize
from torchtune.recipes.evaluate import EvaluateParams, EvaluateRecipe
from torchtune.recipes.export import ExportParams, ExportRecipe
from torchtune.recipes.full_finetune import FullFinetuneParams, FullFinetuneRecipe
from torchtune.recipes.output_folder import output_folder
from torchtune.recipes.quantize import QuantizeParams, QuantizeRecipe
from torchtune.recipes.quickstart import DATA, packaged_model
from torchtune.training.progress import say

# The names of the stages' folders, and of what a later stage starts from.
FINETUNED, QUANTIZED, EXPORTED = "finetuned", "quantized", "exported"
ROWS, HELD_OUT = str(DATA / "train.jsonl"), str(DATA / "held_out.jsonl")


@dataclass(config=STRICT, kw_only=True)
class FinetuneStage(FullFinetuneParams):
    """full_finetune's keys; `lora_finetune` needs its class and recipe here, and `adapter` in the stages after it."""

    model_checkpoint: str = Field(default_factory=packaged_model, description="By default the quickstart's model.")
    dataset: DatasetOptions = Field(
        default_factory=lambda: DatasetOptions(path=ROWS), description="By default the quickstart's rows."
    )
    output_dir: str | None = Field(default=FINETUNED, description="Where all goes; a name is one in output_dir.")


@dataclass(config=STRICT, kw_only=True)
class EvaluateStage(EvaluateParams):
    """evaluate's keys, for the model of each stage in turn."""

    model_checkpoint: str | None = Field(
        default=FINETUNED, description="Not given here: each stage's model is measured."
    )
    dataset: DatasetOptions | None = Field(
        default_factory=lambda: DatasetOptions(path=HELD_OUT),
        description="Data to measure loss and perplexity on; by default the quickstart's held-out rows.",
    )


@dataclass(config=STRICT, kw_only=True)
class QuantizeStage(QuantizeParams):
    """quantize's keys."""

    model_checkpoint: str | None = Field(default=FINETUNED, description="By default the fine-tuned model.")
    output_dir: str = Field(default=QUANTIZED, description="Where the folder goes; a name is one in output_dir.")
    kind: str = Field(default="int8", description="How weights are held: int8, int4, fp8, nf4, ...")


@dataclass(config=STRICT, kw_only=True)
class ExportStage(ExportParams):
    """export's keys. From the fine-tuned model and not the quantised one: rounding twice loses more than once."""

    model_checkpoint: str | None = Field(default=FINETUNED, description="By default the fine-tuned model.")
    output_dir: str = Field(default=EXPORTED, description="Where the folder goes; a name is one in output_dir.")
    format: Literal["safetensors", "gguf", "pt2"] = Field(
        default="gguf", description="As of export, there safetensors."
    )
    gguf_type: Literal["auto", "f32", "f16", "bf16", "q8_0", "q5_0", "q5_1", "q4_0", "q4_1"] = Field(
        default="q8_0", description="Type of the matrices."
    )


@dataclass(config=STRICT, kw_only=True)
class PipelineParams:
    """The stages, and where they write."""

    output_dir: str = Field(default="runs/pipeline", description="The folder of all stages; it must not be there.")
    resume: bool = Field(
        default=False, description="Go on in output_dir: the fine-tune where it was, without stages that are done."
    )
    finetune: FinetuneStage = Field(default_factory=FinetuneStage, description="The fine-tune.")
    evaluate: EvaluateStage = Field(default_factory=EvaluateStage, description="What each stage is measured by.")
    quantize: QuantizeStage = Field(default_factory=QuantizeStage, description="The quantised folder.")
    export: ExportStage = Field(default_factory=ExportStage, description="The exported folder.")

    @model_validator(mode="after")
    def _leads_on(self) -> PipelineParams:
        """Keys of one stage that the others can't do with."""
        problems = []
        if not self.finetune.save_last:
            problems.append("finetune.save_last: false leaves nothing for the stages after it")
        if self.finetune.resume_from_checkpoint is not False:
            problems.append("finetune.resume_from_checkpoint: is what resume=true says for all stages")
        if self.evaluate.model_checkpoint != FINETUNED:
            problems.append("evaluate.model_checkpoint: each stage's model is measured; leave it out")
        if self.finetune.dataset.path != ROWS and self.evaluate.dataset == DatasetOptions(path=HELD_OUT):
            problems.append("evaluate.dataset: is the quickstart's, and finetune.dataset is not; give rows of your own")
        if problems:
            raise ValueError("\n".join(problems))
        return self


Stage = TypeVar("Stage", QuantizeStage, ExportStage)


def check(params: PipelineParams) -> None:
    """All stages before the first: later ones with the base in place of the model that is trained from it.

    Raises:
        ConfigError, CheckpointError, DataError, UnsupportedError: what any of the stages refuses; an output that is there.
    """
    if not params.resume:
        output_folder(params.output_dir)
    base = params.finetune.model_checkpoint
    full_finetune.check(finetuning(params))
    evaluate.check(replace(params.evaluate, model_checkpoint=base))
    quantizing, exporting = later(params, params.quantize, base), later(params, params.export, base)
    if not is_done(quantizing):
        quantize.check(quantizing)
    if not is_done(exporting):
        export.check(exporting)


def main() -> None:
    """The stages, one after the other."""
    params = parse_params(PipelineParams)
    found: dict[str, Any] = {}
    with process_group(params.finetune.device):  # one rank is not a special case
        check(params)
        found["base"] = measure(params, params.finetune.model_checkpoint)

        finetune = finetuning(params)
        recipe = FullFinetuneRecipe(params=finetune)
        recipe.setup(params=finetune)
        recipe.train()
        recipe.cleanup()
        del recipe  # its memory is for the next stage
        step = newest_step(Path(finetune.output_dir or FINETUNED))
        assert step is not None, "the fine-tune saves at its end"
        found[FINETUNED] = measure(params, str(step))
        goes_on = is_main()
    if not goes_on:
        return  # what follows is the work of one process

    quantizing = later(params, params.quantize, str(step))
    if not is_done(quantizing):
        quantizer = QuantizeRecipe(quantizing)
        quantizer.setup(quantizing)
        quantizer.quantize()
    found[QUANTIZED] = measure(params, quantizing.output_dir)

    exporting = later(params, params.export, str(step))
    if not is_done(exporting):
        exporter = ExportRecipe(exporting)
        exporter.setup(exporting)
        exporter.export()
    if exporting.format != "pt2":  # which evaluate does not read
        file = next(Path(exporting.output_dir).glob("*.gguf"), None)
        found[EXPORTED] = measure(params, str(file or exporting.output_dir))

    (Path(params.output_dir) / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, measured in found.items():
        say(f"{name:10} loss {measured['loss']:.4f}, perplexity {measured['perplexity']:.3f}: {measured['model']}")


def measure(params: PipelineParams, model: str) -> dict[str, Any]:
    """Loss and perplexity of a model on the rows of the stage `evaluate`."""
    stage = replace(params.evaluate, model_checkpoint=model)
    recipe = EvaluateRecipe(stage)
    recipe.setup(stage)
    found = recipe.evaluate()
    return {"model": found["model"], **found["dataset"]}


def finetuning(params: PipelineParams) -> FinetuneStage:
    """The fine-tune's params, its folder in `output_dir`."""
    folder = Path(params.output_dir) / (params.finetune.output_dir or FINETUNED)
    resume = "auto" if params.resume else False
    return replace(params.finetune, output_dir=str(folder), resume_from_checkpoint=resume)


def later(params: PipelineParams, stage: Stage, finetuned: str) -> Stage:
    """A later stage's params, its folder in `output_dir`, and what it starts from."""
    start = finetuned if stage.model_checkpoint == FINETUNED else stage.model_checkpoint
    return replace(stage, model_checkpoint=start, output_dir=str(Path(params.output_dir) / stage.output_dir))


def is_done(stage: QuantizeStage | ExportStage) -> bool:
    """Whether a stage's folder is there, which is whole then; said, for its keys may have changed since."""
    folder = Path(stage.output_dir)
    is_there = folder.is_dir() and any(folder.iterdir())
    if is_there:
        say(f"{folder}: is there, and left as it is")
    return is_there


if __name__ == "__main__":
    main()
