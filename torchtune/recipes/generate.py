"""Generate: answers of any checkpoint to prompts from the command line, a file or a data set.

    tune run generate model_checkpoint=SmolLM2-135M-Instruct prompt="What is a pipe?"
    tune run generate model_checkpoint=runs/mine/step_100 prompts=questions.jsonl output=answers.jsonl

Each answer is one JSON object a line, with `text`. A single prompt on the command line is answered as it is written,
token by token. Several processes share the prompts.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from torchtune.config.parse import parse_params
from torchtune.config.strict import STRICT
from torchtune.data.files.find import How
from torchtune.data.prompts import Prompt, chat_of, prompt_of
from torchtune.data.rows import open_rows
from torchtune.distributed.process_group import gather_objects, is_main, process_group, rank, world_size
from torchtune.errors import ConfigError, Problems
from torchtune.generation.generate import Answer, generate
from torchtune.generation.text import Detokenizer
from torchtune.recipes.inference import Asked, ModelParams, PromptParams, SamplingParams, open_asked
from torchtune.recipes.params import Count
from torchtune.training.progress import say

SECONDS_BETWEEN_LINES = 5.0


@dataclass(config=STRICT, kw_only=True)
class GenerateParams(ModelParams, PromptParams, SamplingParams):
    """All keys of this recipe."""

    prompt: str | list[str] = Field(default_factory=list, description="A prompt, or several.")
    prompts: str | None = Field(
        default=None,
        description="A file or hub id: a prompt a line, or rows with prompt, messages, instruction or text.",
    )
    split: str | None = Field(default=None, description="Which split of prompts, where it has several.")
    limit: Count | None = Field(default=None, description="Only the first rows of prompts.")
    output: str | None = Field(
        default=None, description="A file of one JSON object a line; by default standard output."
    )
    batch_size: Count = Field(default=8, description="Prompts at a time.")
    logprobs: bool = Field(default=False, description="Write the log-probability of each token.")

    @model_validator(mode="after")
    def _asks_something(self) -> GenerateParams:
        if not self.prompt and self.prompts is None:
            raise ValueError("prompts: neither it nor prompt is given; there is nothing to answer")
        return self


@plain_dataclass
class _Asking:
    """A prompt that is being answered."""

    prompt: Prompt
    ids: list[int]
    text: Detokenizer

    def reads(self, answer: Answer) -> bool:
        """Take in the answer's new tokens; whether a stop text is in it now."""
        self.text.push(answer.ids)
        return self.text.is_stopped


def check(params: GenerateParams) -> None:
    """Compare the params with what lies on disk; no weight is read.

    Raises:
        ConfigError, CheckpointError, DataError: what is named is not there, or does not fit; a prompt that is too long.
    """
    GenerateRecipe(params).setup(params)


class GenerateRecipe:
    """Answers prompts. The order: `__init__`, `setup`, `generate`."""

    def __init__(self, params: GenerateParams) -> None:
        self._params = params
        self._output = None if params.output is None else Path(params.output)
        if self._output is not None and (self._output.is_dir() or not self._output.absolute().parent.is_dir()):
            raise ConfigError(f"{self._output} is no file in a folder that is there", key="output")

    def setup(self, params: GenerateParams) -> None:
        """Open the model, read and encode the prompts; no weight is read yet."""
        self._asked: Asked = open_asked(params, params)
        self._asking = [self._prepared(prompt) for prompt in self._prompts()]
        if not self._asking:
            raise ConfigError("there is no row in it", key="prompts")
        self._refuse_long()

    @property
    def num_prompts(self) -> int:
        """How many are answered."""
        return len(self._asking)

    def generate(self) -> Iterator[dict[str, Any]]:
        """The answers as they are written, in the order of the prompts; of several ranks, each has every so-manieth."""
        params = self._params
        own = self._asking[rank() :: world_size()]
        model = self._asked.load(params)
        ready: dict[int, dict[str, Any]] = {}
        next_one = 0
        for answer in generate(
            model,
            [asking.ids for asking in own],
            max_new_tokens=params.max_new_tokens,
            stop_ids=self._asked.stop_ids,
            ends=lambda answer: own[answer.prompt].reads(answer),
            sampling=params.sampling,
            seed=params.seed,
            numbers=range(rank(), len(self._asking), world_size()),
            batch_size=params.batch_size,
            logprobs=params.logprobs,
        ):
            if answer.ended_by:
                ready[answer.prompt] = self._row(own[answer.prompt], answer)
            while next_one in ready:
                yield ready.pop(next_one)
                next_one += 1

    def stream(self) -> Iterator[str]:
        """The answer to the first prompt, piece by piece."""
        asking, params = self._asking[0], self._params
        for answer in generate(
            self._asked.load(params),
            [asking.ids],
            max_new_tokens=params.max_new_tokens,
            stop_ids=self._asked.stop_ids,
            sampling=params.sampling,
            seed=params.seed,
        ):
            yield asking.text.push(answer.ids)
            if asking.text.is_stopped:
                return
        yield asking.text.end()

    def _prompts(self) -> Iterator[Prompt]:
        params, as_chat = self._params, self._asked.as_chat
        for text in [params.prompt] if isinstance(params.prompt, str) else params.prompt:
            yield Prompt(chat_of(text, params.system) if as_chat else text, source="prompt")
        if params.prompts is not None:
            rows = open_rows(params.prompts, limit=params.limit, how=How(split=params.split, sample_by="line"))
            yield from (prompt_of(row, as_chat=as_chat, system=params.system) for row in rows)

    def _prepared(self, prompt: Prompt) -> _Asking:
        ids = self._asked.prompter.encode(prompt)
        return _Asking(prompt, ids, Detokenizer(self._asked.tokenizer, ids, self._params.stops))

    def _refuse_long(self) -> None:
        """Refuse prompts that leave no room for an answer; say so of those that leave less than is asked for."""
        context, wanted = self._asked.context, self._params.max_new_tokens
        if context is None:
            return
        problems = Problems()
        for asking in self._asking:
            if len(asking.ids) >= context:
                where = asking.prompt.source
                problems.add("prompts", f"{where}: it has {len(asking.ids)} tokens, and the model {context} positions")
        problems.raise_all()
        if short := [asking for asking in self._asking if len(asking.ids) + wanted > context]:
            first = short[0]
            say(
                f"{len(short)} of {len(self._asking)} prompts leave less room than max_new_tokens={wanted}, and their "
                f"answers end with the model's {context} positions (the first is {first.prompt.source}, with "
                f"{len(first.ids)} tokens)"
            )

    def _row(self, asking: _Asking, answer: Answer) -> dict[str, Any]:
        asking.text.push(answer.ids)
        asking.text.end()
        asked = asking.prompt.asked
        row: dict[str, Any] = {"messages" if isinstance(asked, list) else "prompt": asked}
        row |= {"text": asking.text.text, "finish_reason": "stop" if answer.ended_by == "stop" else "length"}
        row |= {"num_tokens": len(answer.ids)}
        if asking.prompt.expected is not None:
            row["expected"] = asking.prompt.expected
        if self._params.logprobs:
            row |= {"token_ids": answer.ids, "logprobs": answer.logprobs}
        return row


def main() -> None:
    """The recipe as a program: `tune run generate key=value ...`."""
    params = parse_params(GenerateParams)
    with process_group(params.device):
        recipe = GenerateRecipe(params)
        recipe.setup(params)
        if isinstance(params.prompt, str) and params.output is None and params.prompts is None and sys.stdout.isatty():
            for piece in recipe.stream():
                print(piece, end="", flush=True)
            print()
            return
        if world_size() == 1:
            _write(recipe.generate(), recipe.num_prompts, params.output)
            return
        shares = gather_objects(list(recipe.generate()))
        if is_main():
            rows = [shares[number % len(shares)][number // len(shares)] for number in range(recipe.num_prompts)]
            _write(iter(rows), recipe.num_prompts, params.output)


def _write(rows: Iterator[dict[str, Any]], num_rows: int, output: str | None) -> None:
    """Write rows as they come, and say now and then how far it is."""
    start = last = time.monotonic()
    num_tokens = 0
    with nullcontext(sys.stdout) if output is None else open(output, "w", encoding="utf-8") as file:
        for number, row in enumerate(rows, start=1):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            num_tokens += row["num_tokens"]
            now = time.monotonic()
            if now - last >= SECONDS_BETWEEN_LINES or number == num_rows:
                say(f"{number}/{num_rows} answers  {num_tokens / (now - start):.0f} tokens/s")
                last = now
    if output is not None:
        say(f"{output}: written")


if __name__ == "__main__":
    main()
