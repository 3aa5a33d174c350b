"""What the model says in the middle of its training: the same prompts now and then, said and kept in OUT/samples.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchtune.checkpoint.open import Checkpoint
from torchtune.data.prompts import Prompt, chat_of
from torchtune.distributed.process_group import is_main
from torchtune.errors import ConfigError
from torchtune.generation.generate import generate
from torchtune.generation.sampling import Sampling
from torchtune.models.config import context_length
from torchtune.modules.decoder import CausalLM
from torchtune.recipes.live_model import asking, prompter_of
from torchtune.recipes.params import FinetuneParams, SamplesParams
from torchtune.recipes.run_state import RunState
from torchtune.tokenizers.tokenizer import Tokenizer
from torchtune.training.metrics_file import MetricsFile
from torchtune.training.progress import say

SAMPLES_FILE = "samples.jsonl"


def open_samples(
    params: FinetuneParams, checkpoint: Checkpoint, tokenizer: Tokenizer, state: RunState, output: Path
) -> Samples | None:
    """What the params' `samples` ask for, if they do."""
    return None if params.samples is None else Samples(params, checkpoint, tokenizer, state, output)


class Samples:
    """Asks the model that is trained. Every rank does, side by side: where a layer is split, all are needed.

    What is drawn has numbers of its own, so that training goes on as it would have.

    Args:
        params: with `samples`.
        output: the run's folder; lines of later steps are cut, as those of metrics are.
    Raises:
        ConfigError: a prompt that leaves no room for an answer.
    """

    def __init__(
        self, params: FinetuneParams, checkpoint: Checkpoint, tokenizer: Tokenizer, state: RunState, output: Path
    ) -> None:
        assert params.samples is not None
        self._params: SamplesParams = params.samples
        self._is_compiled = params.compile
        self._tokenizer, self._stop_ids, self._seed = tokenizer, checkpoint.stop_ids, state.seed
        prompter = prompter_of(params, checkpoint, tokenizer, state)
        self._texts = self._params.texts
        asked: list[Any] = [chat_of(text) if prompter.has_template else text for text in self._texts]
        self._prompts = [prompter.encode(Prompt(each, source="samples.prompts")) for each in asked]
        self._file = MetricsFile(output / SAMPLES_FILE)
        longest, context = max(map(len, self._prompts)), context_length(checkpoint.config)
        if context is not None and longest >= context:
            raise ConfigError(
                f"a prompt has {longest} tokens, and the model {context} positions", key="samples.prompts"
            )
        if is_main():
            self._file.resume_at(state.total_training_steps)

    def __call__(self, model: CausalLM, step: int) -> None:
        """Answer the prompts as the model is after this step."""
        params = self._params
        with asking(model, is_compiled=self._is_compiled):
            found = {
                answer.prompt: self._tokenizer.decode(answer.ids)
                for answer in generate(
                    model,
                    self._prompts,
                    max_new_tokens=params.max_new_tokens,
                    stop_ids=self._stop_ids,
                    sampling=Sampling(temperature=params.temperature, top_p=params.top_p),
                    seed=self._seed,
                )
                if answer.ended_by
            }
        for place, text in enumerate(self._texts):
            if is_main():
                self._file.log_dict({"prompt": text, "text": found[place]}, step)
            say(f"step {step}  {text!r}: {found[place]!r}")
