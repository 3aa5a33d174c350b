"""A model as EleutherAI's lm-eval asks it (extra `eval`): its requests by our scoring and generation.

Encoding, truncation and stop texts are those of lm-eval's own `hf` model, so that the numbers are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from torchtune.data.prompts import Prompter
from torchtune.distributed.process_group import barrier, gather_objects, rank, world_size
from torchtune.errors import ConfigError, DataError
from torchtune.evaluation.scoring import BATCH_TOKENS, score
from torchtune.generation.generate import Answer, generate
from torchtune.generation.sampling import Sampling
from torchtune.generation.text import Detokenizer
from torchtune.modules.decoder import CausalLM
from torchtune.tokenizers.tokenizer import Tokenizer

MAX_GEN_TOKENS = 256  # as lm-eval's own models
DEFAULT_CONTEXT = 2048
# What a task may say of how answers are generated, besides `until` and the number of tokens.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class HarnessModel(TemplateLM):
    """Scores and answers for lm-eval.

    Args:
        model: with its weights.
        tokenizer: the checkpoint's.
        prompter: has its template.
        stop_ids: tokens that end an answer.
        name: of the checkpoint, for caches.
        batch_tokens: tokens of a forward.
        batch_size: answers generated at a time.
        max_length: tokens of context and continuation at most; by default the model's positions.
        together: whether the processes share the requests of each task; otherwise each asks all of them.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        prompter: Prompter,
        *,
        stop_ids: Sequence[int],
        name: str,
        batch_tokens: int = BATCH_TOKENS,
        batch_size: int = 8,
        max_length: int | None = None,
        together: bool = True,
    ) -> None:
        super().__init__()
        self._model, self._tokenizer, self._prompter, self._stop_ids = model, tokenizer, prompter, stop_ids
        self._name, self._batch_tokens, self._batch_size = name, batch_tokens, batch_size
        self.max_length = max_length or model.model.max_positions or DEFAULT_CONTEXT
        self._rank, self._world_size = (rank(), world_size()) if together else (0, 1)
        self._is_quiet = rank() != 0
        self._device = model.model.embed_tokens.weight.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text.

        Raises:
            ConfigError: the tokenizer has none.
        """
        for token in (self._tokenizer.eos_id, self._tokenizer.bos_id):
            if token is not None:
                return token
        raise ConfigError("the tokenizer has neither an EOS nor a BOS token, which lm-eval needs", key="tasks")

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        return self.eot_token_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Tells caches of requests apart."""
        return self._name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text, for lm-eval's record of a run."""
        return self._prompter.source if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as text; without a generation prompt the last one is left open, to be gone on with."""
        try:
            return self._rendered(chat_history, add_generation_prompt)
        except DataError:
            without = [message for message in chat_history if message["role"] != "system"]
            if len(without) == len(chat_history):
                raise
            return self._rendered(without, add_generation_prompt)

    def _rendered(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        if add_generation_prompt:
            return str.__str__(self._prompter.render(messages))
        text = str.__str__(self._prompter.render(messages, add_generation_prompt=False))
        last = messages[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text; a BOS that it begins with already is not added."""
        if add_special_tokens is None:
            prefix = self._tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
            add_special_tokens = not has_bos_prefix(string, prefix)
        return list(
            self._tokenizer.encode(string).ids if add_special_tokens else self._tokenizer.encode_plain_text(string)
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._cut(context, continuation) for _, context, continuation in requests]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        quiet = disable_tqdm or self._is_quiet
        for place, scored in tqdm(
            score(self._model, pairs, batch_tokens=self._batch_tokens),
            total=len(pairs),
            desc="log-likelihoods",
            disable=quiet,
        ):
            found[place] = (scored.logprob, scored.is_greedy)
            if (request := requests[place][0]) is not None:
                self.cache_hook.add_partial("loglikelihood", request, found[place])
        return found

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """What fits, of the context its end."""
        if not continuation:
            raise ConfigError("a request has an empty continuation, which has no likelihood", key="tasks")
        if len(continuation) > self.max_length:
            raise ConfigError(
                f"a continuation has {len(continuation)} tokens, and there are {self.max_length} positions", key="tasks"
            )
        kept = [*context, *continuation][-(self.max_length + 1) :]
        return kept[: -len(continuation)], continuation

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, each token with as much before it as there is room for."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for place, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(place)
        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(windows, disable_tqdm)  # type: ignore[arg-type]
        for place, (logprob, _) in zip(owners, scored, strict=True):
            totals[place] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, those that are generated alike together."""
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(place)
        found = [""] * len(requests)
        with tqdm(total=len(requests), desc="answers", disable=disable_tqdm or self._is_quiet) as bar:
            for places in groups.values():
                options = requests[places[0]].args[1]
                for place, text in self._generated([requests[p].args[0] for p in places], options):
                    found[places[place]] = text
                    self.cache_hook.add_partial("generate_until", requests[places[place]].args, text)
                    bar.update()
        return found

    def _generated(self, contexts: Sequence[str], options: dict[str, Any]) -> Iterable[tuple[int, str]]:
        kwargs = dict(normalize_gen_kwargs(options, MAX_GEN_TOKENS))
        eos = self._tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        until = handle_stop_sequences(kwargs.pop("until", None), eos=eos)
        max_new_tokens = int(kwargs.pop("max_gen_toks"))
        sampling = Sampling(**{name: kwargs[name] for name in SAMPLING if kwargs.get(name) is not None})
        room = self.max_length - max_new_tokens
        if room <= 0:
            raise ConfigError(
                f"a task asks for {max_new_tokens} new tokens, and there are {self.max_length} positions", key="tasks"
            )
        prompts = [self.tok_encode(context)[-room:] for context in contexts]
        # The longest together, so that a batch's keys are of like length.
        order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
        stops = [stop for stop in until if stop]
        texts = [Detokenizer(self._tokenizer, (), stops) for _ in order]
        for answer in generate(
            self._model,
            [prompts[place] for place in order],
            max_new_tokens=max_new_tokens,
            stop_ids=self._stop_ids,
            ends=_reader(texts),
            sampling=sampling,
            batch_size=self._batch_size,
            numbers=order,
        ):
            if answer.ended_by:
                text = self._tokenizer.decode(answer.ids)
                yield order[answer.prompt], postprocess_generated_text(text, until, None)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Each rank's tensor, side by side."""
        return torch.cat([each.reshape(-1) for each in gather_objects(tensor.cpu())])

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Each rank's object, on rank `dst`."""
        gathered = gather_objects(obj)
        return gathered if self.rank == dst else None

    def barrier(self) -> None:
        """Wait for all ranks."""
        barrier()


def _reader(texts: Sequence[Detokenizer]) -> Callable[[Answer], bool]:
    def ends(answer: Answer) -> bool:
        texts[answer.prompt].push(answer.ids)
        return texts[answer.prompt].is_stopped

    return ends
