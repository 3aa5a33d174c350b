"""The one renderer: a row to token ids and the mask of trained ones.

Every recipe, `tune inspect` and generation go through it, so what is trained is what is shown and what is
fed at inference. A row's way: messages.py (one spelling), template.py (text that knows where it comes from),
turns.py (where the model speaks), encoding.py (tokens and mask).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import Any

from torchtune.data.draft import Draft, Drafts, Turn
from torchtune.data.encoding import Encoder
from torchtune.data.options import OnPromptMismatch, SpecialTokensInContent, TrainOn
from torchtune.data.reading import Conversation, Reading, Text
from torchtune.data.rows import Row
from torchtune.data.sample import Sample
from torchtune.data.template import ChatTemplate, TemplateRefused
from torchtune.data.tracked import Tracked, concat, mark
from torchtune.data.turns import TurnFinder
from torchtune.errors import DataError
from torchtune.tokenizers.tokenizer import Tokenizer


@dataclass
class Rendered:
    """One row as samples.

    Attributes:
        samples: what it gives; none if nothing of it is trained.
        notes: what was found in it that the user should hear of.
        error: why it can't be trained on, in place of samples.
    """

    samples: list[Sample] = field(default_factory=list)
    notes: set[str] = field(default_factory=set)
    error: DataError | None = None


class Renderer:
    """Renders the rows of one data set. Safe to use from several threads, and can be sent to processes.

    Args:
        tokenizer: the checkpoint's.
        chat_template: the template, or `default` and `tool_use` by name (`choose_template`); None: there is none.
        reading: how rows become messages.
        train_on: `assistant`, `last_assistant`, or `all` (every token).
        special_tokens_in_content: `error`, `split` (encode as plain text) or `allow`.
        template_variables: for the template, besides the tokenizer's own tokens.
        stop_tokens: texts of the tokens on which generation stops, if known.
        now: the time that the template is told.
        on_prompt_mismatch: what a turn does that the template opens otherwise at inference: `error`, or
            `as_written` (train what the template writes).
    Raises:
        DataError: a template is not valid.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: str | Mapping[str, str] | None,
        *,
        reading: Reading,
        train_on: TrainOn = "assistant",
        special_tokens_in_content: SpecialTokensInContent = "error",
        template_variables: Mapping[str, Any] | None = None,
        stop_tokens: Collection[str] = (),
        now: datetime | None = None,
        on_prompt_mismatch: OnPromptMismatch = "error",
    ) -> None:
        self.tokenizer = tokenizer
        self.reading = reading
        self.train_on = train_on
        self._encoder = Encoder(tokenizer, special_tokens_in_content)
        variables = {**tokenizer.special, **(template_variables or {})}
        templates = {"default": chat_template} if isinstance(chat_template, str) else dict(chat_template or {})
        now = now or datetime.now()
        self._finders = {
            name: TurnFinder(
                ChatTemplate(source, variables, now),
                tokenizer.special_tokens,
                tokenizer.added_tokens,
                set(stop_tokens),
                tokenizer.eos_token,
                as_written=on_prompt_mismatch == "as_written",
            )
            for name, source in templates.items()
        }

    def samples(self, row: Row) -> list[Sample]:
        """The samples of a row, in which each has a trained token; none if no turn of it is to be trained.

        Raises:
            DataError: the row can't be trained on; with file and line.
        """
        (rendered,) = self.render([row])
        if rendered.error is not None:
            raise rendered.error
        return rendered.samples

    def render(self, rows: Sequence[Row | DataError]) -> list[Rendered]:
        """Many rows at once, encoded together; a row that failed to be read keeps its error."""
        drafted = [self._drafted(row) for row in rows]
        texts = [draft.text for each in drafted if isinstance(each, Drafts) for draft in each.drafts]
        tokens = iter(self._encoder.encode_batch(texts))
        results = []
        for row, each in zip(rows, drafted, strict=True):
            if isinstance(each, DataError):
                results.append(Rendered(error=each))
                continue
            assert isinstance(row, Row)
            encoded = [next(tokens) for _ in each.drafts]
            try:
                samples = self._encoder.samples_of(each.drafts, encoded, source=row.source, row=row.index)
                results.append(Rendered([sample for sample in samples if sample.num_trained], each.notes))
            except DataError as error:
                results.append(Rendered(error=_at(error, row.source)))
        return results

    def _drafted(self, row: Row | DataError) -> Drafts | DataError:
        if isinstance(row, DataError):
            return row
        try:
            return self.drafts(row)
        except DataError as error:
            return _at(error, row.source)

    def drafts(self, row: Row) -> Drafts:
        """The samples of a row as text, each with the regions that are trained."""
        read = self.reading.read(row.record)
        if isinstance(read, Text):
            return Drafts([Draft(Tracked(read.text), [Turn(0, 0, len(read.text))], is_chat=False)])
        wanted = self._wanted(read)
        if not self._finders:
            return self._plain(read, wanted)
        finder = self._finders["tool_use" if read.tools and "tool_use" in self._finders else "default"]
        try:
            if self.train_on == "all":
                text = finder.template.render_tracked(finder.forms.apply(read.messages), read.tools)
                return Drafts([Draft(text, [Turn(0, 0, len(text))])])
            return finder.drafts(read, wanted)
        except TemplateRefused as error:
            raise TemplateRefused(error.message, remedy=_remedy(read)) from error

    def _wanted(self, conversation: Conversation) -> list[int]:
        """The messages that are to be trained."""
        if self.train_on == "all":
            return list(range(len(conversation.messages)))
        assistants = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        if not assistants:
            raise DataError("no message of this row is the assistant's, so there is nothing to train on")
        if self.train_on == "last_assistant":
            assistants = assistants[-1:]
        return [i for i in assistants if conversation.may_train[i]]

    def _plain(self, conversation: Conversation, wanted: list[int]) -> Drafts:
        """Strings for a model without a chat template: prompt, completion, EOS."""
        if conversation.plain is None:
            raise DataError(
                "messages need a chat template and this checkpoint has none; "
                "give one by dataset.chat_template=FILE.jinja"
            )
        prompt, completion = conversation.plain
        text = concat((mark(prompt, (0, "prompt")), mark(completion, (1, "completion"))))
        begin = 0 if self.train_on == "all" else len(prompt)
        return Drafts([Draft(text, [Turn(1, begin, len(text))] if wanted else [], is_chat=False)])


def _remedy(conversation: Conversation) -> str:
    """What can be done about a template that refuses these messages."""
    roles = [message["role"] for message in conversation.messages]
    remedies = []
    if "system" in roles:
        remedies.append("dataset.system=fold puts the system message before the first user message's words")
    if any(one == other for one, other in pairwise(roles)):
        remedies.append("dataset.merge_turns=true joins messages of the same role")
    remedies.append("dataset.chat_template=FILE.jinja gives another template")
    return "; ".join(remedies)


def _at(error: DataError, source: str) -> DataError:
    """The same error with its file and line."""
    error.source = source
    error.args = (f"{source}: {error.problem}",)
    return error
