"""lm-eval's tasks, asked of a model: by `evaluate` of a checkpoint, and in the middle of training of what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtune.checkpoint.open import Checkpoint
from torchtune.data.prompts import Prompter
from torchtune.errors import ConfigError, MissingDependencyError, Problems, did_you_mean
from torchtune.modules.decoder import CausalLM
from torchtune.recipes.live_model import asking, prompter_of
from torchtune.recipes.params import FinetuneParams, TaskParams
from torchtune.recipes.run_state import RunState
from torchtune.tokenizers.tokenizer import Tokenizer
from torchtune.training.progress import say


def open_tasks(params: TaskParams, key: str = "") -> Any:
    """lm-eval's tasks and those of `include_path`, once it is known that those asked for are among them.

    Args:
        key: where the params stand, with a dot behind.
    Raises:
        ConfigError: there is no such task or folder.
        MissingDependencyError: lm-eval is not installed.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingDependencyError("lm-eval", extra="eval", needed_for="tasks") from error
    if params.include_path is not None and not Path(params.include_path).is_dir():
        raise ConfigError(f"{params.include_path} is no folder", key=f"{key}include_path")
    tasks = TaskManager(include_path=params.include_path)
    problems = Problems()
    for name in params.task_names:
        if not tasks.match_tasks([name]):
            problems.add(f"{key}tasks", f"there is no task '{name}'{did_you_mean(name, tasks.all_tasks)}")
    problems.raise_all()
    return tasks


@dataclass(frozen=True)
class Measuring:
    """What tasks are asked with, besides the model.

    Attributes:
        tasks: as `open_tasks` gives them.
        stop_ids: tokens that end an answer.
        name: of the model, for caches.
        seed: of the choice of examples and of what is drawn.
        together: whether ranks share the questions; otherwise each asks all of them.
    """

    params: TaskParams
    tasks: Any
    tokenizer: Tokenizer
    prompter: Prompter
    stop_ids: Sequence[int]
    name: str
    seed: int
    together: bool = True

    def ask(self, model: CausalLM, *, max_length: int | None = None, **options: Any) -> dict[str, Any]:
        """lm-eval's results; empty on all but the first rank.

        Args:
            max_length: tokens of a request at most; by default the context.
            options: further ones of lm-eval's `simple_evaluate`.
        """
        from lm_eval import simple_evaluate

        from torchtune.evaluation.harness import HarnessModel

        params = self.params
        asked = HarnessModel(
            model,
            self.tokenizer,
            self.prompter,
            stop_ids=self.stop_ids,
            name=self.name,
            batch_tokens=params.batch_tokens,
            batch_size=params.batch_size,
            max_length=max_length,
            together=self.together,
        )
        seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        found = simple_evaluate(
            asked,
            tasks=params.task_names,
            num_fewshot=params.num_fewshot,
            limit=params.limit,
            task_manager=self.tasks,
            apply_chat_template=params.apply_chat_template,
            fewshot_as_multiturn=params.fewshot_as_multiturn,
            gen_kwargs=params.gen_kwargs or None,
            confirm_run_unsafe_code=params.confirm_run_unsafe_code,
            **dict.fromkeys(seeds, self.seed),
            **options,
        )
        return found or {}


def open_evaluation(
    params: FinetuneParams, checkpoint: Checkpoint, tokenizer: Tokenizer, state: RunState
) -> Evaluation | None:
    """What the params' `evaluation` asks for, if it does."""
    if params.evaluation is None:
        return None
    measuring = Measuring(
        params.evaluation,
        open_tasks(params.evaluation, "evaluation."),
        tokenizer,
        prompter_of(params, checkpoint, tokenizer, state),
        checkpoint.stop_ids,
        checkpoint.source,
        state.seed,
        together=False,
    )
    return Evaluation(measuring, is_compiled=params.compile)


class Evaluation:
    """Asks the model that is trained. Every rank does, side by side: where a layer is split, all are needed."""

    def __init__(self, measuring: Measuring, *, is_compiled: bool) -> None:
        self._measuring, self._is_compiled = measuring, is_compiled

    def __call__(self, model: CausalLM) -> dict[str, float]:
        """The tasks' metrics as TASK/METRIC; none on all but the first rank."""
        with asking(model, is_compiled=self._is_compiled):
            found = self._measuring.ask(model, bootstrap_iters=0, log_samples=False)
        metrics = dict[str, float]()
        for task, results in found.get("results", {}).items():
            # lm-eval's names are "acc,none", and "acc,FILTER" where a task filters answers; a text is no metric.
            named = {name.removesuffix(",none").replace(",", "/"): value for name, value in results.items()}
            metrics |= {f"{task}/{name}": value for name, value in named.items() if isinstance(value, float)}
        if metrics:
            say("  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        return metrics
