"""A conversation with a model: what was said, asked as the checkpoint's template has it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic.dataclasses import dataclass

from torchtune.config.strict import STRICT
from torchtune.data.prompts import Prompt
from torchtune.errors import ConfigError, DataError
from torchtune.generation.beginnings import Remembered
from torchtune.generation.generate import generate
from torchtune.generation.text import Detokenizer
from torchtune.recipes.inference import ModelParams, PromptParams, SamplingParams, open_asked


@dataclass(config=STRICT, kw_only=True)
class ChatParams(ModelParams, PromptParams, SamplingParams):
    """The keys of `tune chat`."""


class Chat:
    """Holds the model and the messages.

    Raises:
        ConfigError: the model has no chat template.
    """

    def __init__(self, params: ChatParams) -> None:
        self._params = params
        self._asked = open_asked(params, params)
        if not self._asked.as_chat:
            raise ConfigError("the model has no chat template to talk by; give one", key="chat_template")
        self._model = self._asked.load(params)
        self._system = params.system
        self._remembered = Remembered()
        self.messages: list[dict[str, Any]] = []
        self.reset()

    @property
    def name(self) -> str:
        """What the model is called."""
        return self._asked.adapted.checkpoint.source

    def reset(self, system: str | None = None) -> None:
        """Forget what was said.

        Args:
            system: another system message; an empty one is none.
        """
        self._system = self._system if system is None else system
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def undo(self) -> None:
        """Forget the last question and its answer."""
        asked = [place for place, message in enumerate(self.messages) if message["role"] == "user"]
        del self.messages[asked[-1] if asked else len(self.messages) :]

    def say(self, text: str) -> Iterator[str]:
        """Ask, and give the answer piece by piece; what was given of it is remembered, also when it is broken off.

        Raises:
            DataError: the conversation has outgrown the model's context, or the template refuses it.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._asked.prompter.encode(Prompt(messages))
        if self._asked.context is not None and len(ids) >= self._asked.context:
            raise DataError(
                f"the conversation has {len(ids)} tokens, and the model {self._asked.context} positions; /reset begins anew"
            )
        params, answered = self._params, Detokenizer(self._asked.tokenizer, ids, self._params.stops)
        self.messages = messages
        try:
            for answer in generate(
                self._model,
                [ids],
                max_new_tokens=params.max_new_tokens,
                stop_ids=self._asked.stop_ids,
                sampling=params.sampling,
                seed=params.seed,
                numbers=[len(messages)],
                batch_size=1,
                remembered=self._remembered,
            ):
                yield answered.push(answer.ids)
                if answered.is_stopped:
                    break
            yield answered.end()
        finally:
            self.messages.append({"role": "assistant", "content": answered.text})

    def history(self) -> str:
        """What was said, for people."""
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.messages)

    def save(self, path: str) -> None:
        """Append what was said to a file, as a row for training.

        Raises:
            ConfigError: no file is named.
            OSError: it can't be written.
        """
        if not path:
            raise ConfigError("name a file: /save chats.jsonl", where="chat")
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
