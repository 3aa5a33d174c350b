"""Greedy decoding: tokens per second of one prompt and of several, against transformers and the weight products alone.

    python benchmarks/decode.py                       the quickstart's model
    python benchmarks/decode.py --model DIR --dtype float32

The products are those of a step, of every weight with as many rows as there are prompts, by `F.linear`; and by the
copies of weights that we decode with, below which we cannot go. All are measured in turn, in one process, and of each the
fastest and the median of the rounds are shown. Both decode from the same prompts; that their tokens agree is counted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from sft_vs_trl import cpu_name, float32_checkpoint
from transformers import AutoModelForCausalLM

from torchtune.checkpoint.load import load_model
from torchtune.generation.generate import generate
from torchtune.modules.decoder import CausalLM
from torchtune.modules.decoding import ready_to_decode
from torchtune.training.precision import dtype_name, get_dtype

HERE = Path(__file__).parent


def main() -> None:
    """Measure, print a table, write it under results/."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, help="a checkpoint folder; by default the quickstart's")
    parser.add_argument("--dtype", help="bfloat16 or float32; by default what `dtype=auto` takes on this machine")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="decode")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype) if options.dtype else get_dtype("auto", torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        source = options.model or float32_checkpoint(Path(folder) / "SmolLM2-135M-Instruct")
        ours = load_model(source, dtype=dtype)
        theirs = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    ready_to_decode(ours)
    rows = [measure(ours, theirs, dtype, number, options) for number in options.prompts]
    report(rows, dtype, options)


def measure(
    ours: CausalLM, theirs: torch.nn.Module, dtype: torch.dtype, number: int, options: argparse.Namespace
) -> dict[str, object]:
    """Seconds a step of each, by name, over the rounds."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = ours.model.embed_tokens.num_embeddings
    prompts = torch.randint(10, vocab_size, (number, options.prompt_tokens), generator=generator)
    answers: dict[str, list[list[int]]] = {}

    def by_us(new: int) -> None:
        given = prompts.tolist()
        ended = {a.prompt: a.ids for a in generate(ours, given, max_new_tokens=new, batch_size=number) if a.ended_by}
        answers["ours"] = [ended[place] for place in range(number)]

    def by_them(new: int) -> None:
        mask = torch.ones_like(prompts)
        found = theirs.generate(  # type: ignore[operator]
            prompts, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )
        answers["theirs"] = found[:, prompts.shape[1] :].tolist()

    seconds: dict[str, list[float]] = {"torchtune": [], "transformers": [], "products": [], "products by copies": []}
    for _ in range(options.rounds):
        seconds["torchtune"].append(per_step(by_us, options.new_tokens))
        seconds["transformers"].append(per_step(by_them, options.new_tokens))
        seconds["products"].append(products(ours, dtype, number, options.new_tokens))
        seconds["products by copies"].append(products_by_copies(ours, dtype, number, options.new_tokens))
    same = [
        next((n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), options.new_tokens)
        for one, other in zip(answers["ours"], answers["theirs"], strict=True)
    ]
    return {"prompts": number, "seconds": seconds, "same_tokens": same}


def per_step(decode: Callable[[int], None], new_tokens: int) -> float:
    """Seconds of a step alone: what more tokens take more, so that reading the prompt does not count."""
    times = []
    for new in (2, 2 + new_tokens):
        start = time.perf_counter()
        decode(new)
        times.append(time.perf_counter() - start)
    return (times[1] - times[0]) / new_tokens


@torch.no_grad()
def products(model: CausalLM, dtype: torch.dtype, number: int, num_steps: int) -> float:
    """Seconds of a step's weight products, the mean of as many steps as are decoded."""
    weights = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in name]
    weights.append(model.head_weight)  # type: ignore[arg-type]
    inputs = {weight.shape[1]: torch.randn(number, weight.shape[1], dtype=dtype) for weight in weights}
    return timed([partial(F.linear, inputs[weight.shape[1]], weight) for weight in weights], num_steps)


@torch.no_grad()
def products_by_copies(model: CausalLM, dtype: torch.dtype, number: int, num_steps: int) -> float:
    """The same by the copies that `ready_to_decode` made; where it made none, nothing is to be measured."""
    held = [(getattr(layer, "joined", None) or layer) for layer in model.model.modules() if hasattr(layer, "laid_out")]
    copies = [(layer.laid_out, layer.weight) for layer in held if layer.laid_out is not None]
    if model.head_laid_out is not None:
        copies.append((model.head_laid_out, model.head_weight))
    calls = [partial(copy.product, torch.randn(number, weight.shape[1], dtype=dtype), None) for copy, weight in copies]
    return timed(calls, num_steps) if calls else math.nan


def timed(calls: list[Callable[[], torch.Tensor]], num_steps: int) -> float:
    """Seconds that all of them take once, the mean of several times."""
    start = time.perf_counter()
    for _ in range(num_steps):
        for call in calls:
            call()
    return (time.perf_counter() - start) / num_steps


def report(rows: list[dict[str, object]], dtype: torch.dtype, options: argparse.Namespace) -> None:
    """A table for people and the numbers behind it."""
    title = options.model.name if options.model else "SmolLM2-135M-Instruct"
    lines = [
        f"# Decoding {title} in {dtype_name(dtype)}, {datetime.date.today()}",
        "",
        f"{cpu_name()}, {torch.get_num_threads()} threads; Python {platform.python_version()}, torch {torch.__version__}.",
        f"Prompts of {options.prompt_tokens} tokens, {options.new_tokens} new ones, {options.rounds} rounds in turn.",
        "",
        "| prompts | | tokens/s, fastest | tokens/s, median | of what the products allow, fastest | median |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        number, seconds = row["prompts"], row["seconds"]
        assert isinstance(number, int)
        assert isinstance(seconds, dict)
        for name, found in seconds.items():
            cells = [f"{number / of(found):.1f}" for of in (min, statistics.median)]
            cells += [f"{of(seconds['products']) / of(found):.2f}" for of in (min, statistics.median)]
            lines.append(f"| {number} | {name} | {' | '.join(cells)} |")
        lines.append(f"| {number} | tokens that agree, of {options.new_tokens + 2} | {row['same_tokens']} | | | |")
    text = "\n".join(lines) + "\n"
    print(text)
    target = HERE / "results" / f"{datetime.date.today()}-{options.name}-{dtype_name(dtype)}"
    target.with_suffix(".md").write_text(text, encoding="utf-8")
    target.with_suffix(".json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
