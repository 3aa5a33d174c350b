"""lm-eval's requests: our model class against lm-eval's own `hf`, a task of each kind.

    python benchmarks/evaluate.py                        the quickstart's model, in float32
    python benchmarks/evaluate.py --dtype bfloat16

Tasks are made of the documentation in Python's library. Either side is a process of its own with one thread; they take
turns, and only the model's requests count, tokens included, not their building. What is measured is the processor's time,
which other work on the machine disturbs least. `hf` has the batch size that is best for the kind among those tried.
Every value and answer of both sides is compared.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import multiprocessing
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import yaml
from sft_vs_trl import cpu_name, float32_checkpoint

from torchtune.training.precision import dtype_name

HERE = Path(__file__).parent
REQUESTS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
GOALS = {True: 2.0, False: 1.2}  # by whether requests share a context


@dataclass(frozen=True)
class Kind:
    """A task: its rows, and what lm-eval is told of it.

    Attributes:
        shares: whether requests begin alike.
    """

    name: str
    about: str
    shares: bool
    rows: list[dict[str, Any]]
    task: dict[str, Any]


def kinds() -> list[Kind]:
    """The same on each run, for one version of Python."""
    texts = paragraphs()
    mean = {"aggregation": "mean", "higher_is_better": True}
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}\n",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", **mean}],
    }
    letters = choice | {
        "doc_to_text": "{{text}}\nWhich of these comes next?\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\n"
        "D. {{choices[3]}}\nAnswer:",
        "doc_to_choice": ["A", "B", "C", "D"],
        "target_delimiter": " ",
    }
    shots = {"fewshot_split": "train", "fewshot_config": {"sampler": "first_n"}, "num_fewshot": 5}
    last_word = {
        "output_type": "loglikelihood",
        "doc_to_text": "{{before}}",
        "doc_to_target": "{{last}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", **mean},
        ],
    }
    rolling = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
    }
    until = {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}\n\nIn short:",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n\n", "\n*"], "max_gen_toks": 48, "do_sample": False},
        "metric_list": [{"metric": "exact_match", **mean}],
    }
    next_one, long, whole = followed(texts), followed(passages()), whole_texts()
    words = [{"before": text.rpartition(" ")[0], "last": " " + text.rpartition(" ")[2]} for text in texts]
    return [
        Kind("choice", "4 answers of several tokens to each passage", True, long[:6], choice),
        Kind("choice_shots", "the same to paragraphs behind 5 examples", True, next_one[:4], choice | shots),
        Kind("letter_shots", "4 answers of one token behind 5 examples", True, next_one[:6], letters | shots),
        Kind("letter", "4 answers of one token", False, next_one[:16], letters),
        Kind("likelihood", "the last word of a paragraph", False, words[:40], last_word),
        Kind("rolling", "whole texts", False, [{"text": text} for text in whole[:6]], rolling),
        Kind("rolling_short", "whole paragraphs", False, [{"text": text} for text in texts[:40]], rolling),
        Kind("until", "answers of up to 48 tokens, with stop texts", False, next_one[:12], until),
        Kind("until_shots", "the same behind 5 examples", True, next_one[:8], until | shots),
    ]


def paragraphs() -> list[str]:
    """Prose from the documentation, in an order that is always the same."""
    ordered = sorted({part for text in topics.values() for part in prose(text)})
    random.Random(0).shuffle(ordered)
    return ordered


def passages() -> list[str]:
    """Three paragraphs that follow each other, as one."""
    parts = [prose(text) for _, text in sorted(topics.items())]
    ordered = sorted({" ".join(those[at : at + 3]) for those in parts for at in range(0, len(those) - 2, 3)})
    random.Random(0).shuffle(ordered)
    return ordered


def prose(text: str) -> list[str]:
    """A topic's paragraphs that are sentences."""
    return [
        " ".join(part.split())
        for part in text.split("\n\n")
        if part[:1].isalpha() and 200 <= len(part) <= 1500 and "::=" not in part and "***" not in part
    ]


def followed(texts: list[str]) -> list[dict[str, Any]]:
    """Paragraphs without their last sentence, and that among three of others."""
    draw, pairs = random.Random(1), []
    for text in texts:
        before, dot, last = text[:-1].rpartition(". ")
        if dot and len(before) >= 150 and 30 <= len(last) <= 250:
            pairs.append((before + ".", last + "."))
    rows = []
    for before, last in pairs:
        choices = [last, *draw.sample([other for _, other in pairs if other != last], 3)]
        draw.shuffle(choices)
        rows.append({"text": before, "choices": choices, "label": choices.index(last)})
    return rows


def whole_texts() -> list[str]:
    """Topics of up to 4,000 characters."""
    found = [text for _, text in sorted(topics.items()) if len(text) <= 4000]
    random.Random(2).shuffle(found)
    return found


def write_tasks(folder: Path) -> None:
    """Files of rows and of tasks, as users write them; the examples before questions are the last rows."""
    for kind in kinds():
        files = {"test": folder / f"{kind.name}.json"}
        files["test"].write_text(json.dumps(kind.rows))
        if "fewshot_split" in kind.task:
            files["train"] = folder / f"{kind.name}-train.json"
            files["train"].write_text(json.dumps(followed(paragraphs())[-8:]))
        data = {
            "task": f"bench_{kind.name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {split: str(file) for split, file in files.items()}},
            "test_split": "test",
        }
        (folder / f"{kind.name}.yaml").write_text(yaml.safe_dump(data | kind.task))


# A side: a process that answers a task by name with what it took and found.


def ours(model: Path, dtype: torch.dtype) -> Any:
    """Our model class, loaded as the recipe loads it."""
    from torchtune.evaluation.harness import HarnessModel
    from torchtune.recipes.evaluate import EvaluateParams
    from torchtune.recipes.inference import open_asked

    params = EvaluateParams(model_checkpoint=str(model), tasks="-", device="cpu", dtype=dtype_name(dtype))
    asked = open_asked(params, params)
    return HarnessModel(
        asked.load(params), asked.tokenizer, asked.prompter, stop_ids=asked.stop_ids, name=model.name, batch_size=8
    )


def theirs(model: Path, dtype: torch.dtype) -> Any:
    """lm-eval's."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(model), dtype=dtype_name_in_torch(dtype), device="cpu", batch_size=1)


def dtype_name_in_torch(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def serve(pipe: Connection, is_ours: bool, model: Path, dtype: torch.dtype, folder: Path) -> None:
    """Load, then answer (task, batch size or None) until None comes."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from torchtune.training.allocator import keep_freed_memory

    torch.set_num_threads(1)
    asked = (ours if is_ours else theirs)(model, dtype)
    seconds: list[float] = []
    values: list[Any] = []

    def timed(method: Callable[..., Any], requests: list[Any], **options: Any) -> Any:
        start = time.process_time()
        with keep_freed_memory(torch.device("cpu")) if is_ours else nullcontext():  # ours, as its recipe does
            found = method(requests, **options)
        seconds.append(time.process_time() - start)
        values.extend(found)
        return found

    for name in REQUESTS:
        setattr(asked, name, partial(timed, getattr(asked, name)))
    tasks = TaskManager(include_path=str(folder))
    pipe.send(None)
    while (work := pipe.recv()) is not None:
        name, batch_size = work
        if batch_size is not None:
            asked.batch_size_per_gpu = batch_size
        seconds.clear()
        values.clear()
        found = simple_evaluate(asked, tasks=[f"bench_{name}"], task_manager=tasks, bootstrap_iters=0)
        metrics = {k: v for k, v in found["results"][f"bench_{name}"].items() if isinstance(v, float)}
        pipe.send({"seconds": sum(seconds), "values": list(values), "metrics": metrics})


class Side:
    """The process, from outside."""

    def __init__(self, is_ours: bool, model: Path, dtype: torch.dtype, folder: Path) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, other = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(other, is_ours, model, dtype, folder), daemon=True)
        self._process.start()
        self._pipe.recv()

    def run(self, name: str, batch_size: int | None = None) -> dict[str, Any]:
        """Seconds of the requests, their values, and the task's metrics."""
        self._pipe.send((name, batch_size))
        found: dict[str, Any] = self._pipe.recv()
        return found

    def close(self) -> None:
        """Let it end."""
        self._pipe.send(None)
        self._process.join()


def main() -> None:
    """Measure, print a table after each kind, write it under results/."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, help="a checkpoint folder; by default the quickstart's")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--kinds", nargs="+", help="by default all")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8], help="those that hf tries")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--name", default="evaluate")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    chosen = [kind for kind in kinds() if not options.kinds or kind.name in options.kinds]
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or float32_checkpoint(Path(folder) / "SmolLM2-135M-Instruct")
        tasks = Path(folder) / "tasks"
        tasks.mkdir()
        write_tasks(tasks)
        sides = [Side(is_ours, model, dtype, tasks) for is_ours in (True, False)]
        rows = []
        for row in measured(chosen, sides, options):
            print(json.dumps({name: row[name] for name in ("kind", "ratio", "hf_batch_size", "seconds")}), flush=True)
            rows.append(row)
            report(rows, dtype, options)  # what is there already, should the rest not come
        for side in sides:
            side.close()


def measured(chosen: list[Kind], sides: list[Side], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each kind's seconds by side over the rounds, and how far the sides agree."""
    us, them = sides
    for kind in chosen:
        ours: list[dict[str, Any]] = []
        theirs: dict[int, list[dict[str, Any]]] = {size: [] for size in options.batch_sizes}
        for _ in range(options.rounds):
            ours.append(us.run(kind.name))
            for size, runs in theirs.items():
                runs.append(them.run(kind.name, size))
        tried = {size: [run["seconds"] for run in runs] for size, runs in theirs.items()}
        best = min(tried, key=lambda size: statistics.median(tried[size]))
        seconds = {"torchtune": [run["seconds"] for run in ours], "hf": tried[best]}
        ratios = [b / a for a, b in zip(seconds["torchtune"], seconds["hf"], strict=True)]
        one, other = ours[-1], theirs[best][-1]
        yield {
            "kind": kind.name,
            "about": kind.about,
            "shares": kind.shares,
            "requests": len(one["values"]),
            "seconds": seconds,
            "ratio": statistics.median(ratios),
            "hf_batch_size": best,
            "hf_tried": tried,
            "metrics": {name: [value, other["metrics"][name]] for name, value in one["metrics"].items()},
            **agreement(one["values"], other["values"]),
        }


def agreement(ours: list[Any], theirs: list[Any]) -> dict[str, Any]:
    """The largest difference of log-likelihoods, as a share of them; or how many answers are the same."""
    if isinstance(ours[0], str):
        return {"same_answers": sum(a == b for a, b in zip(ours, theirs, strict=True))}
    pairs = [(a[0], b[0]) if isinstance(a, tuple) else (a, b) for a, b in zip(ours, theirs, strict=True)]
    return {"largest_difference": max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)}


def report(rows: list[dict[str, Any]], dtype: torch.dtype, options: argparse.Namespace) -> None:
    """A table for people and the numbers behind it, as far as they are there."""
    import lm_eval
    import transformers

    title = options.model.name if options.model else "SmolLM2-135M-Instruct"
    command = f"python benchmarks/evaluate.py{' --model DIR' if options.model else ''} --dtype {options.dtype} --rounds {options.rounds}"
    command += f" --batch-sizes {' '.join(map(str, options.batch_sizes))}"
    lines = [
        f"# lm-eval's requests of {title} in {dtype_name(dtype)}, {datetime.date.today()}",
        "",
        f"{cpu_name()}, 1 thread; Python {platform.python_version()}, torch {torch.__version__}, "
        f"lm-eval {lm_eval.__version__}, transformers {transformers.__version__}.",
        f"`{command}`: in turn with lm-eval's `hf` model, which has the best of the batch sizes tried.",
        "",
        "| kind | requests | requests a second of processor time, median | hf | ratio, median (worst, best) | goal | values |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        us, them = row["seconds"]["torchtune"], row["seconds"]["hf"]
        ratios = sorted(b / a for a, b in zip(us, them, strict=True))
        speeds = [f"{row['requests'] / statistics.median(found):.2f}" for found in (us, them)]
        lines.append(
            f"| {row['kind']}: {row['about']} | {row['requests']} | {speeds[0]} | {speeds[1]}, {row['hf_batch_size']} at a "
            f"time | {row['ratio']:.2f} ({ratios[0]:.2f}, {ratios[-1]:.2f}) | {GOALS[row['shares']]} | {agrees(row)} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    target = HERE / "results" / f"{datetime.date.today()}-{options.name}-{dtype_name(dtype)}"
    target.with_suffix(".md").write_text(text, encoding="utf-8")
    target.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def agrees(row: dict[str, Any]) -> str:
    """How the sides' values compare, in words."""
    if "same_answers" in row:
        return f"{row['same_answers']} answers are the same"
    metrics = max(abs(a - b) / max(1.0, abs(b)) for a, b in row["metrics"].values() if math.isfinite(b))
    return f"log-likelihoods within {row['largest_difference']:.0e}, metrics within {metrics:.0e}"


if __name__ == "__main__":
    main()
