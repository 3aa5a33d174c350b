"""Evaluate: lm-eval's tasks, and the loss and perplexity on any data set.

    tune run evaluate model_checkpoint=SmolLM2-135M-Instruct tasks=[arc_easy,hellaswag] limit=100
    tune run evaluate model_checkpoint=runs/mine/step_100 dataset=held_out.jsonl
    tune run evaluate model_checkpoint=... tasks=[mine] include_path=my_tasks output=results.json

Tasks are lm-eval's own (extra `eval`) or YAML files of yours under `include_path`. Several processes share the work.
"""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from torchtune.config.parse import parse_params
from torchtune.config.strict import STRICT
from torchtune.data.dataset import open_dataset
from torchtune.data.loader import DataLoader
from torchtune.data.options import DatasetOptions
from torchtune.data.sampler import RowSampler
from torchtune.distributed.mesh import MeshSizes, open_mesh
from torchtune.distributed.process_group import is_main, process_group, world_size
from torchtune.errors import ConfigError
from torchtune.evaluation.held_out import held_out_loss
from torchtune.evaluation.scoring import BATCH_TOKENS
from torchtune.modules.decoder import CausalLM
from torchtune.modules.losses import LinearCrossEntropy
from torchtune.recipes.inference import Asked, ModelParams, PromptParams, open_asked
from torchtune.recipes.params import Count, TaskParams
from torchtune.recipes.tasks import Measuring, open_tasks
from torchtune.training.allocator import keep_freed_memory
from torchtune.training.device import get_device
from torchtune.training.progress import say


@dataclass(config=STRICT, kw_only=True)
class EvaluateParams(ModelParams, PromptParams, TaskParams):
    """All keys of this recipe."""

    log_samples: bool = Field(default=False, description="Write each question and answer beside output.")
    apply_chat_template: bool | None = Field(default=False, description="Put tasks' questions through the template.")
    dataset: DatasetOptions | None = Field(default=None, description="Data to measure loss and perplexity on.")
    max_seq_len: Count | None = Field(
        default=None, description="Tokens of a row or request at most; by default the context."
    )
    bootstrap_iters: int = Field(default=100_000, ge=0, description="Draws for tasks' standard errors; 0: none.")
    seed: int = Field(default=42, ge=0, description="Of the choice of examples and of what is drawn.")
    output: str | None = Field(default=None, description="A JSON file for the results.")

    @model_validator(mode="after")
    def _measures_something(self) -> EvaluateParams:
        if not self.tasks and self.dataset is None:
            raise ValueError("tasks: neither it nor dataset is given; there is nothing to measure")
        return self


def check(params: EvaluateParams) -> None:
    """Compare the params with what lies on disk; no weight is read.

    Raises:
        ConfigError, CheckpointError, DataError: what is named is not there, or does not fit.
        MissingDependencyError: lm-eval is not installed.
    """
    EvaluateRecipe(params).setup(params)


class EvaluateRecipe:
    """Measures a model. The order: `__init__`, `setup`, `evaluate`."""

    def __init__(self, params: EvaluateParams) -> None:
        self._params = params
        if params.output is not None and not Path(params.output).absolute().parent.is_dir():
            raise ConfigError(f"{params.output} lies in no folder that is there", key="output")

    def setup(self, params: EvaluateParams) -> None:
        """Open the model, the data and the tasks; no weight is read yet."""
        self._asked: Asked = open_asked(params, params)
        if params.dataset is not None:
            checkpoint = self._asked.adapted.checkpoint
            data = open_dataset(
                params.dataset,
                self._asked.tokenizer,
                checkpoint.chat_template,
                stop_tokens=[self._asked.tokenizer.id_to_token(i) or "" for i in self._asked.stop_ids],
            )
            limit = params.max_seq_len or self._asked.context or BATCH_TOKENS
            self._data = data.prepare(max_seq_len=limit)
            say(str(self._data.report))
        if params.tasks:
            self._tasks = open_tasks(params)

    def evaluate(self) -> dict[str, Any]:
        """All that was asked for, as JSON has it: `results` by task, `dataset` with loss and perplexity.

        On several ranks, all of it on the first one, and what it shares with the others elsewhere.
        """
        with keep_freed_memory(get_device(self._params.device)):
            return self._found(self._asked.load(self._params))

    def _found(self, model: CausalLM) -> dict[str, Any]:
        found: dict[str, Any] = {"model": self._asked.adapted.checkpoint.source}
        if self._params.dataset is not None:
            found["dataset"] = self._loss(model)
        if self._params.tasks:
            found |= self._measured(model)
        return found

    def _loss(self, model: CausalLM) -> dict[str, Any]:
        params, device = self._params, get_device(self._params.device)
        with ExitStack() as until:
            mesh = until.enter_context(open_mesh(MeshSizes(replicate=world_size(), shard=1), device))
            loader = until.enter_context(
                DataLoader(
                    self._data,
                    RowSampler(self._data.num_rows, seed=params.seed, shuffle=False),
                    batch_size=1,
                    gradient_accumulation_steps=1,
                    max_seq_len=max(self._data.report.longest, min(params.batch_tokens, params.max_seq_len or 2**30)),
                    packed=True,
                    seed=params.seed,
                    rank=mesh.data.rank,
                    world_size=mesh.data.size,
                    together=True,
                )
            )
            loss = held_out_loss(model, loader, LinearCrossEntropy(), mesh, device)
        report = self._data.report
        return {
            "path": params.dataset.path if params.dataset else None,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "num_samples": report.num_samples,
            "num_trained_tokens": report.num_trained,
        }

    def _measured(self, model: CausalLM) -> dict[str, Any]:
        params, asked = self._params, self._asked
        source = asked.adapted.checkpoint.source
        measuring = Measuring(params, self._tasks, asked.tokenizer, asked.prompter, asked.stop_ids, source, params.seed)
        found = measuring.ask(
            model,
            max_length=params.max_seq_len,
            system_instruction=params.system,
            log_samples=params.log_samples,
            bootstrap_iters=params.bootstrap_iters,
        )
        kept = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "samples")
        return {key: found[key] for key in kept if key in found}


def main() -> None:
    """The recipe as a program: `tune run evaluate key=value ...`."""
    params = parse_params(EvaluateParams)
    with process_group(params.device):
        recipe = EvaluateRecipe(params)
        recipe.setup(params)
        found = recipe.evaluate()
        if is_main():
            _report(found, params.output)


def _report(found: dict[str, Any], output: str | None) -> None:
    """Print tables; write the JSON file, whole."""
    if "dataset" in found:
        data = found["dataset"]
        print(f"{data['path']}: loss {data['loss']:.4f}, perplexity {data['perplexity']:.3f}")
    if "results" in found:
        from lm_eval.utils import make_table

        print(make_table(found))
        if found.get("groups"):
            print(make_table(found, "groups"))
    if output is not None:
        beside = Path(f"{output}.writing")
        beside.write_text(json.dumps(found, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
        beside.replace(output)
        say(f"{output}: written")


if __name__ == "__main__":
    main()
