"""Samples as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from torchtune.data.inspection.pieces import pieces
from torchtune.data.sample import Sample
from torchtune.tokenizers.tokenizer import Tokenizer

TEMPLATE = "page.html.jinja"


def page(tokenizer: Tokenizer, samples: Sequence[Sample], *, title: str, summary: str, num_left_out: int) -> str:
    """The page's text: what was counted, and each sample token by token.

    Args:
        title: what is shown, for people.
        summary: the lines of the report and the statistics.
        num_left_out: samples that are not on the page.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    rows = [
        {
            "source": sample.source,
            "num_tokens": len(sample),
            "num_trained": sample.num_trained,
            "pieces": [
                {
                    "text": piece.text,
                    "ids": " ".join(map(str, sample.input_ids[piece.start : piece.end].tolist())),
                    "trained": bool(sample.trained[piece.start]),
                }
                for piece in pieces(tokenizer, sample.input_ids.tolist())
            ],
        }
        for sample in samples
    ]
    return environment.get_template(TEMPLATE).render(title=title, summary=summary, rows=rows, num_left_out=num_left_out)
