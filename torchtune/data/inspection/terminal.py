"""Samples token by token in a terminal, the trained ones coloured."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from torchtune.data.inspection.pieces import pieces
from torchtune.data.sample import Sample
from torchtune.tokenizers.tokenizer import Tokenizer

TRAINED = ("black on green3", "black on green1")
CONTEXT = ("default on grey23", "default on grey30")
# Where there is no colour: what is trained stands in these.
OPEN, CLOSE = "[[", "]]"


def show(console: Console, tokenizer: Tokenizer, sample: Sample) -> None:
    """Print a sample: each token on a shade of its own, green where it is trained; `[[...]]` without colour."""
    console.print(
        f"{sample.source}: {len(sample):,} tokens, {sample.num_trained:,} trained", style="bold", highlight=False
    )
    text = Text()
    was_trained = False
    for index, piece in enumerate(pieces(tokenizer, sample.input_ids.tolist())):
        trained = bool(sample.trained[piece.start])
        if not console.color_system and trained != was_trained:
            text.append(OPEN if trained else CLOSE)
        was_trained = trained
        style = (TRAINED if trained else CONTEXT)[index % 2] if console.color_system else ""
        text.append(_visible(piece.text), style)
    if was_trained and not console.color_system:
        text.append(CLOSE)
    console.print(text, soft_wrap=True)
    console.print()


def _visible(text: str) -> str:
    """The text with its line breaks both shown and made, and what a terminal would obey made harmless."""
    shown = text.replace("\r", "␍").replace("\n", "⏎\n").replace("\t", "⇥")
    return "".join(char if char == "\n" or char.isprintable() else f"\\x{ord(char):02x}" for char in shown)
