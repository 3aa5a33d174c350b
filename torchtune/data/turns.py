"""Where in a rendering the model speaks, proven against what inference would feed it.

For the assistant's turn i, two renderings say it all: what inference feeds before it (the messages before it,
with the generation prompt), and the conversation up to and with it. What the second has beyond the first is
what the model is to say, and it is trained up to and with the end of turn.

Earlier turns of a chat share one sample, as long as each stands there exactly as it would at inference. Where
a template writes an earlier turn otherwise (reasoning dropped once a user has answered), it gets a sample of
its own. Which words are whose is read off the tracked rendering, so a region that holds another message's
words is an error, not a mask.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, TypeVar

from torchtune.data.calls import CALL_PROBE, TOOL_PROBE
from torchtune.data.draft import Draft, Drafts, Turn
from torchtune.data.forms import PROBE, Forms
from torchtune.data.reading import Conversation
from torchtune.data.template import ChatTemplate, Message
from torchtune.data.tracked import Tracked, concat, plain
from torchtune.data.turn_checks import any_of, compare_marks, left_out, refuse_foreign, shown, words_of
from torchtune.errors import DataError

Text = TypeVar("Text", str, Tracked)
# Variables by which templates switch off the reasoning that they open at inference.
THINKING_VARIABLES = ("enable_thinking", "thinking")
_WORDS, _CALL = "words", "call"


class TurnFinder:
    """Finds the assistant's turns of conversations in the renderings of one template.

    Args:
        template: renders.
        special_tokens: the texts of the tokenizer's special tokens.
        added_tokens: those of all added tokens.
        stop_tokens: the texts of tokens on which generation stops, if known; what ends a turn is one of them.
        as_written: where a turn is opened otherwise at inference, train what the template writes; else refuse it.
        eos_token: the tokenizer's; one of those that may end a turn where none of `stop_tokens` is written.
    """

    def __init__(
        self,
        template: ChatTemplate,
        special_tokens: Collection[str],
        added_tokens: Collection[str],
        stop_tokens: Collection[str],
        eos_token: str | None,
        *,
        as_written: bool = False,
    ) -> None:
        self.template = template
        self._as_written = as_written
        self._special = any_of(special_tokens)
        self._added = any_of(added_tokens)
        self._stops = set(stop_tokens)
        self._likely_stops = {eos_token} if eos_token else set()  # and what ends a made-up turn
        self._header = ""  # what opens the assistant's turn: the generation prompt, or what stands in its place
        self._lead = ""  # what stands between what inference feeds and the first word
        self._has_generation_prompt = True
        self.forms = Forms(template)
        # GLM's models end their turn by the token that opens the next one: <|user|>, or <|observation|> after a call.
        self._openings: dict[str, str] = {}
        self._probe()

    def drafts(self, conversation: Conversation, wanted: Sequence[int]) -> Drafts:
        """The samples that train the assistant messages `wanted`, ascending.

        Raises:
            DataError: the template refuses the messages, or does not read as inference will.
        """
        messages, tools = self.forms.apply(conversation.messages), conversation.tools
        result = Drafts([])
        for i in reversed(wanted):
            prompt = self.template.render(messages[:i], tools, add_generation_prompt=True)
            whole = self._closed(self.template.render(messages[: i + 1], tools), messages[i]) if result.drafts else ""
            turn = None
            for draft in result.drafts:
                if turn := self._within(draft, prompt, whole, i):
                    draft.turns.insert(0, turn)
                    break
            if turn is None:
                result.drafts.append(self._own(prompt, i, messages, tools))
                result.notes |= left_out(result.drafts[-1].text, messages[: i + 1], conversation)
        if self.template.has_generation_marks:
            compared = (compare_marks(draft.text, turn) for draft in result.drafts for turn in draft.turns)
            result.notes.update(filter(None, compared))
        result.drafts.reverse()
        return result

    def _within(self, draft: Draft, prompt: str, whole: str, i: int) -> Turn | None:
        """Turn i in a draft that ends with a later turn; None if it stands there otherwise than at inference.

        `whole` is the conversation up to and with turn i.
        """
        last_word = max((end for _, end in words_of(draft.text, i)), default=0)
        if not (
            draft.text.startswith(prompt) and whole.startswith(prompt) and whole.startswith(draft.text[:last_word])
        ):
            return None
        turn = self._turn(draft.text, whole, prompt, i)
        if not draft.text.startswith(whole[: turn.end]):
            return None
        refuse_foreign(draft.text, turn)
        return turn

    def _own(self, prompt: str, i: int, messages: Sequence[Message], tools: list[Any] | None) -> Draft:
        """A draft that ends with turn i."""
        text = self.template.render_tracked(messages[: i + 1], tools)
        if not text.startswith(prompt):
            # The template writes what comes before otherwise when a turn follows: go by what inference feeds.
            opening = self._opening(text, prompt, i)
            if opening is None:
                prompt = text[: _shared(text, prompt)]
            else:
                before = self.template.render_tracked(messages[:i], tools, add_generation_prompt=True)
                text = concat((before, text.cut(opening, len(text))))
        text = self._closed(text, messages[i])
        turn = self._turn(text, text, prompt, i)
        refuse_foreign(text, turn)
        return Draft(text, [turn])

    def _closed(self, whole: Text, message: Message) -> Text:
        """A rendering that ends with a turn, with the token by which the model ends it where the template writes none."""
        return whole + self._openings[_CALL if "tool_calls" in message else _WORDS] if self._openings else whole

    def _turn(self, text: Tracked, whole: str, prompt: str, i: int) -> Turn:
        """Turn i, which stands behind `prompt` in `text`, and at the end of `whole`."""
        words = words_of(text, i)
        start = len(prompt)
        tail = max([end for _, end in words], default=start)
        end = tail + self._end_of_turn(whole[tail:], i)
        if words and words[0][0] < start:
            raise DataError(f"the chat template writes words of message {i + 1} before the assistant's turn is opened")
        # Where there is no generation prompt, inference has to write what opens the turn itself.
        if not self._has_generation_prompt and whole[start:].startswith(self._header):
            start += len(self._header)
        return Turn(i, start, end)

    def _opening(self, text: Tracked, prompt: str, i: int) -> int | None:
        """Where turn i begins in a rendering that does not begin with `prompt`; None: take it as it is written."""
        first_word = min((begin for begin, _ in words_of(text, i)), default=len(text))
        place = text.rfind(self._header, 0, first_word) if self._header else -1
        if place >= 0:
            return place + len(self._header)
        if not self._header and text[:first_word].endswith(self._lead):
            return first_word - len(self._lead)
        if self._as_written:
            return None
        shared = _shared(text, prompt)
        raise DataError(
            f"the chat template opens the turn of message {i + 1} at inference with {shown(prompt[shared:])} but "
            f"writes it here as {shown(plain(text)[shared:])}, so training on it would not read as inference does; "
            + self._remedy()
        )

    def _remedy(self) -> str:
        variable = next((name for name in THINKING_VARIABLES if name in self.template.source), None)
        example = f"={{{variable}: false}}, for rows without reasoning" if variable else ""
        return (
            "give dataset.chat_template a template for training, or the variable that makes them agree "
            f"by dataset.chat_template_kwargs{example}; dataset.on_prompt_mismatch=as_written trains such rows as they are written"
        )

    def _end_of_turn(self, tail: str, i: int) -> int:
        """How much of `tail`, the template's text behind the turn's last word, the model is to say."""
        for stops in (self._stops, self._likely_stops):
            if found := [place + len(stop) for stop in stops if (place := tail.find(stop)) >= 0]:
                return min(found)
        if specials := [match.end() for match in self._special.finditer(tail)]:
            return specials[-1]
        if tail:
            return len(tail.rstrip()) or len(tail)
        raise DataError(
            f"the chat template writes nothing behind the words of message {i + 1}, so that the model would never "
            "learn to stop; give dataset.chat_template one that ends the assistant's turns"
        )

    def _probe(self) -> None:
        """Learn from a made-up exchange how this template opens and ends the assistant's turn."""
        try:
            probe = self.forms.apply(PROBE)
            fed = self.template.render(probe[:1], add_generation_prompt=True)
            without = self.template.render(probe[:1])
            whole = self.template.render_tracked(probe)
        except DataError:
            return  # a template that wants other messages: each row then speaks for itself
        words = words_of(whole, 1)
        if not words:
            return
        self._has_generation_prompt = fed != without
        tail = plain(whole)[words[-1][1] :]
        if match := self._special.search(tail) or self._added.search(tail):
            self._likely_stops.add(match.group())
        if not tail:
            self._openings = self._openings_as_ends()
        if whole.startswith(fed):
            self._lead = plain(whole)[len(fed) : words[0][0]]
        if self._has_generation_prompt:
            self._header = fed[len(without) :] if fed.startswith(without) else ""
        elif self._lead.strip():
            # A space before the first word is the model's to say: it is part of the word's token.
            self._header = self._lead.rstrip(" ")

    def _openings_as_ends(self) -> dict[str, str]:
        """By kind of turn, the token that opens what follows it; nothing unless generation stops on both."""
        found = {}
        for kind, exchange, answer in ((_WORDS, PROBE, PROBE[0]), (_CALL, CALL_PROBE, TOOL_PROBE)):
            try:
                whole = self.template.render(self.forms.apply(exchange))
                longer = self.template.render(self.forms.apply([*exchange, answer]))
            except DataError:
                return {}
            opens = self._special.match(longer, len(whole)) if longer.startswith(whole) else None
            if opens is None or opens.group() not in self._stops:
                return {}
            found[kind] = opens.group()
        return found


def _shared(text: str, prompt: str) -> int:
    """How many characters both begin with."""
    pairs = enumerate(zip(text, prompt, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(text), len(prompt)))
