"""Text from a model: many prompts at once, a token of each a step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from torchtune.generation.beginnings import Remembered, beginning_of, read
from torchtune.generation.sampling import GREEDY, Sampling, choose, generator_of
from torchtune.modules.decoder import CausalLM
from torchtune.modules.documents import Documents

PREFILL_TOKENS = 4096  # tokens of prompts that are read in one forward


@dataclass
class Answer:
    """What a model makes of one prompt.

    Attributes:
        prompt: its place among the prompts.
        ids: the new tokens, without the stop token.
        logprobs: of each of them, and of the stop token if there is one: its log-probability under the model, before
            penalty and temperature.
        ended_by: a stop token or text; the number of tokens that there may be; the model's context, before that number
            was reached. None while it goes on.
    """

    prompt: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended_by: Literal["stop", "length", "context"] | None = None


# Whether an answer that has just got a token ends with it.
Ends = Callable[[Answer], bool]


def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    ends: Ends | None = None,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    numbers: Iterable[int] | None = None,
    batch_size: int = 8,
    logprobs: bool = False,
    remembered: Remembered | None = None,
) -> Iterator[Answer]:
    """Answer prompts, so many at a time; an answer that ends gives its place to the next prompt.

    An answer is the same alone and in any batch, to rounding, and so is a drawn one: each has random numbers of its
    own. What all prompts begin with is read once, if it is much of them. Tokens are those of a forward over the whole
    text for each: where a text grows so long that other frequencies turn it (longrope, dynamic), it is read again.

    Args:
        prompts: the tokens of each, with whatever the template puts before an answer.
        max_new_tokens: of an answer at most; it ends where the model's context does, too.
        stop_ids: tokens that end an answer.
        ends: tells that an answer ends, once for each of its tokens.
        sampling: how a token is chosen.
        seed, numbers: what is drawn for a prompt depends on the two; by default prompts are numbered in their order.
        batch_size: prompts at a time.
        logprobs: whether answers have them.
        remembered: of one prompt at a time: what it begins with of what this holds is not read again. It then holds
            what was read in the end.
    Yields:
        The answer that has just got a token, or ended; the same object each time. With one prompt at a time they come
        in order.
    Raises:
        ValueError: a prompt without tokens, or with as many as the model has positions.
    """
    assert remembered is None or batch_size == 1, batch_size
    batch = _Batch(model, max_new_tokens, frozenset(stop_ids), ends, sampling, seed, logprobs, remembered)
    beginning = beginning_of(prompts)
    waiting = zip(count(), count() if numbers is None else numbers, prompts)
    was_training = model.training
    model.eval()
    try:
        if beginning:
            batch.shared = read(model, beginning)
        while True:
            fresh = list(islice(waiting, batch_size - batch.num_texts))
            if not fresh and not batch.num_texts:
                return
            batch.arrange(fresh)
            yield from batch.advance()
    finally:
        model.train(was_training)
        batch.remember()


def generate_one(
    model: CausalLM, prompt: Sequence[int], *, max_new_tokens: int, stop_ids: Collection[int] = ()
) -> Iterator[int]:
    """The most likely next tokens after a prompt, as they come; the stop token is not among them."""
    num_given = 0
    for answer in generate(model, [prompt], max_new_tokens=max_new_tokens, stop_ids=stop_ids):
        yield from answer.ids[num_given:]
        num_given = len(answer.ids)


@dataclass
class _Text:
    """A prompt that is being answered.

    Attributes:
        ids: prompt and answer.
        limit: tokens of the answer at most.
    """

    answer: Answer
    ids: list[int]
    limit: int
    random: np.random.Generator


@dataclass
class _Batch:
    """Texts that grow together: those of the cache's slots, None where one has ended."""

    model: CausalLM
    max_new_tokens: int
    stop_ids: frozenset[int]
    ends: Ends | None
    sampling: Sampling
    seed: int
    logprobs: bool
    remembered: Remembered | None = None
    shared: Remembered | None = None

    def __post_init__(self) -> None:
        self._device = self.model.model.embed_tokens.weight.device
        self._slots: list[_Text | None] = []
        self._last: _Text | None = None
        self._cache = self.model.empty_cache(0)
        if self.remembered is not None and self.remembered.cache is not None:
            self._slots, self._cache = [None], self.remembered.cache

    @property
    def num_texts(self) -> int:
        """Texts that go on."""
        return len(self._texts)

    @property
    def _texts(self) -> dict[int, _Text]:
        """By slot."""
        return {slot: text for slot, text in enumerate(self._slots) if text is not None}

    def arrange(self, fresh: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        """Take up prompts, each with its place and the number that it is drawn by, and leave no slot empty."""
        texts = [self._text(*each) for each in fresh]
        self._last = texts[-1] if texts else self._last
        free = [slot for slot, text in enumerate(self._slots) if text is None]
        if len(free) == len(texts):
            for slot, text in zip(free, texts, strict=True):
                self._slots[slot] = text
            self._cache.of(*free).forget([self._num_known(text, self.remembered) for text in texts])
        else:
            kept = self._texts
            self._slots = [*kept.values(), *texts]
            self._cache = self._cache.arranged([*kept, *([None] * len(texts))])
            free = list(range(len(kept), len(self._slots)))
        if self.shared is not None and self.shared.cache is not None:
            for slot, text in zip(free, texts, strict=True):
                self._cache.begin(slot, self.shared.cache, self._num_known(text, self.shared))

    def _num_known(self, text: _Text, known: Remembered | None) -> int:
        """How many of its tokens have been read, turned by the frequencies that it has itself."""
        if known is None or not self.model.model.turns_alike(len(known.ids), len(text.ids)):
            return 0
        return known.num_shared(text.ids)

    @torch.no_grad()
    def advance(self) -> Iterator[Answer]:
        """Give each text one more token."""
        texts, decoder = self._texts, self.model.model
        for slot, text in texts.items():
            of_slot = self._cache.of(slot)
            if not decoder.turns_alike(of_slot.lengths[0], len(text.ids)):
                of_slot.forget([0])
        lengths = self._cache.lengths
        unread = {slot: len(text.ids) - lengths[slot] for slot, text in texts.items()}
        begun = [slot for slot in texts if not lengths[slot] or unread[slot] > 1]
        rows = [self._read(group) for group in _groups(begun, unread)]
        if going_on := [slot for slot in texts if slot not in begun]:
            rows.append(self._step(going_on))
        self._choose([texts[slot] for slot in (*begun, *going_on)], torch.cat(rows))
        answers = [text.answer for text in texts.values()]
        self._slots = [None if text is None or text.answer.ended_by else text for text in self._slots]
        return iter(answers)

    def _read(self, slots: Sequence[int]) -> Tensor:
        """The logits after texts of which several tokens are not cached: [texts, V]."""
        cache = self._cache.of(*slots)
        starts = cache.lengths
        ids = [self._texts[slot].ids[start:] for slot, start in zip(slots, starts, strict=True)]
        documents = Documents.from_lengths([len(text) for text in ids], starts=starts, device=self._device)
        flat = torch.tensor([token for text in ids for token in text], device=self._device)
        return self.model(flat, documents, cache=cache, at=documents.cu_seqlens[1:] - 1)

    def _step(self, slots: Sequence[int]) -> Tensor:
        """The logits after texts of which all but the last token is cached: [texts, V]."""
        cache = self._cache.of(*slots)
        ids = torch.tensor([self._texts[slot].ids[-1] for slot in slots], device=self._device)
        return self.model(ids, Documents.next_tokens(cache.lengths, self._device), cache=cache)

    def remember(self) -> None:
        """Leave what was read of the last text."""
        if self.remembered is not None and self._last is not None:
            self.remembered.ids = self._last.ids[: self._cache.lengths[0]]
            self.remembered.cache = self._cache

    def _choose(self, texts: Sequence[_Text], logits: Tensor) -> None:
        seen = None
        if self.sampling.repetition_penalty != 1.0:
            seen = torch.zeros_like(logits, dtype=torch.bool)
            for row, text in zip(seen, texts, strict=True):
                row[torch.tensor(text.ids, device=row.device)] = True
        tokens = choose(logits, self.sampling, [text.random for text in texts], seen)
        logprobs = None
        if self.logprobs:
            logprobs = logits.float().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1).tolist()
        for index, (text, token) in enumerate(zip(texts, tokens.tolist(), strict=True)):
            if logprobs is not None:
                text.answer.logprobs.append(logprobs[index])
            self._append(text, token)

    def _append(self, text: _Text, token: int) -> None:
        answer = text.answer
        if token in self.stop_ids:
            answer.ended_by = "stop"
            return
        answer.ids.append(token)
        text.ids.append(token)
        if self.ends is not None and self.ends(answer):
            answer.ended_by = "stop"
        elif len(answer.ids) >= text.limit:
            answer.ended_by = "length" if text.limit == self.max_new_tokens else "context"

    def _text(self, place: int, number: int, ids: Sequence[int]) -> _Text:
        limit, context = self.max_new_tokens, self.model.model.max_positions
        if not ids:
            raise ValueError(f"prompt {place} has no token; a model needs one to go on from")
        if context is not None:
            if len(ids) >= context:
                raise ValueError(f"prompt {place} has {len(ids)} tokens, and the model {context} positions")
            limit = min(limit, context - len(ids))
        return _Text(Answer(place), list(ids), limit, generator_of(self.seed, number))


def _groups(slots: Sequence[int], num_tokens: Mapping[int, int]) -> Iterator[list[int]]:
    """The slots in groups of at most PREFILL_TOKENS tokens, or of one."""
    group, total = list[int](), 0
    for slot in slots:
        if group and total + num_tokens[slot] > PREFILL_TOKENS:
            yield group
            group, total = [], 0
        group.append(slot)
        total += num_tokens[slot]
    if group:
        yield group
