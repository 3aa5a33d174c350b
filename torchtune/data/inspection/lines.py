"""Samples as JSON lines, for programs."""

from __future__ import annotations

import json

from torchtune.data.inspection.pieces import decode, trained_spans
from torchtune.data.sample import Sample
from torchtune.tokenizers.tokenizer import Tokenizer


def json_line(tokenizer: Tokenizer, sample: Sample) -> str:
    """One sample: `row` (from 0), `source` (file:line), `ids`, `trained` (1 where the id is a target), `text`,
    and `trained_text`, the text of each run of trained tokens."""
    ids = sample.input_ids.tolist()
    value = {
        "row": sample.row,
        "source": sample.source,
        "ids": ids,
        "trained": sample.trained.astype(int).tolist(),
        "text": decode(tokenizer, ids),
        "trained_text": trained_spans(tokenizer, ids, sample.trained),
    }
    return json.dumps(value, ensure_ascii=False)
