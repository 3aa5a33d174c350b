"""`tune inspect model_checkpoint=... dataset=...`: look at data as it will be trained on, without reading a weight."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from torchtune.cli.tune import parser

if TYPE_CHECKING:
    from torchtune.data.mix import Mix
    from torchtune.data.prepare import Prepared
    from torchtune.data.sample import Sample
    from torchtune.tokenizers.tokenizer import Tokenizer

SHOWN_ROWS, PAGE_ROWS = 3, 200
DESCRIPTION = """\
Look at data as it will be trained on: numbers, and rows token by token with the trained ones coloured.
Takes the keys of a fine-tune (model_checkpoint=..., dataset=..., max_seq_len=..., --config FILE) and reads no weight.
"""


def run(argv: list[str]) -> int:
    """Print statistics and rows, or write them as a page or as JSON lines."""
    options, keys = _parse(argv)
    from torchtune.config.parse import parse_params
    from torchtune.data.inspection.statistics import statistics
    from torchtune.recipes import choices
    from torchtune.recipes.base_checkpoint import open_base_checkpoint
    from torchtune.recipes.checks import check_data
    from torchtune.recipes.finetune_data import prepare_data
    from torchtune.recipes.lora_params import LoRAParams
    from torchtune.training.progress import say
    from torchtune.training.seed import draw_seed

    params = parse_params(LoRAParams, keys)  # every fine-tune's keys, so that any of their configs can be looked at
    check_data(params)
    checkpoint = open_base_checkpoint(params.model_checkpoint, params, weights=False)
    tokenizer = checkpoint.tokenizer()
    limit = choices.longest_allowed(params, checkpoint.config)
    data = prepare_data(
        params, checkpoint, tokenizer, max_seq_len=limit, seed=draw_seed(params.seed), now=datetime.now()
    ).train
    batching = choices.choose_batching(params, data.report, limit=limit, world_size=1)
    counted = statistics(data.checked_samples(), pack_tokens=batching.max_seq_len)
    summary = f"{data.report}\n{counted}"
    if options.json:
        say(summary)
        return _print_json(tokenizer, _all_samples(data, options.rows))
    if options.html is not None:
        shown = list(islice(_all_samples(data, None), options.rows or PAGE_ROWS))
        _write_page(options.html, tokenizer, shown, params.model_checkpoint, summary, counted.num_samples)
        print(f"{summary}\n{options.html}: {len(shown)} samples")
        return 0
    print(summary + "\n")
    _show(tokenizer, _all_samples(data, SHOWN_ROWS if options.rows is None else options.rows))
    return 0


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    arguments = parser("inspect", DESCRIPTION)
    arguments.formatter_class = argparse.RawDescriptionHelpFormatter
    arguments.allow_abbrev = False
    arguments.usage = "tune inspect model_checkpoint=... dataset=... [key=value ...] [--rows N] [--html FILE | --json]"
    arguments.add_argument("--rows", type=int, metavar="N", help="how many samples are shown")
    kind = arguments.add_mutually_exclusive_group()
    kind.add_argument("--html", type=Path, metavar="FILE", help="write a page that needs nothing else")
    kind.add_argument(
        "--json", action="store_true", help="print a JSON object a sample, all of them; numbers on stderr"
    )
    if not argv:
        arguments.print_help()
        raise SystemExit(2)
    return arguments.parse_known_args(argv)


def _all_samples(data: Prepared | Mix, number: int | None) -> Iterator[Sample]:
    return islice((sample for row in range(data.num_rows) for sample in data.samples_of(row)), number)


def _print_json(tokenizer: Tokenizer, samples: Iterator[Sample]) -> int:
    from torchtune.data.inspection.lines import json_line

    try:
        for sample in samples:
            # UTF-8 whatever the locale: a program reads it.
            sys.stdout.buffer.write(json_line(tokenizer, sample).encode("utf-8") + b"\n")
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _write_page(
    path: Path, tokenizer: Tokenizer, samples: list[Sample], model: str, summary: str, num_samples: int
) -> None:
    from torchtune.data.inspection.page import page
    from torchtune.errors import ConfigError

    text = page(
        tokenizer,
        samples,
        title=f"What {Path(model).name} is trained on",
        summary=summary,
        num_left_out=max(num_samples - len(samples), 0),
    )
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror}", where="command line", key="--html") from error


def _show(tokenizer: Tokenizer, samples: Iterator[Sample]) -> None:
    from rich.console import Console

    from torchtune.data.inspection.terminal import show

    console = Console(highlight=False, emoji=False, markup=False)
    for sample in samples:
        show(console, tokenizer, sample)
