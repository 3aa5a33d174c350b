"""A file of a million rows and a gigabyte: time to the first step, memory of the loader, and a resume far into it.

    python benchmarks/large_file.py

Needs the dev extra (a tiny random checkpoint is made through transformers) and 2 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date, datetime
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_config
from torchtune.checkpoint.open import open_checkpoint
from torchtune.data.batch import Batch
from torchtune.data.dataset import open_dataset
from torchtune.data.loader import DataLoader
from torchtune.data.options import DatasetOptions

ROW_CHARS = 850
MAX_SEQ_LEN = 1024
ROWS_BEFORE = 20_000


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--resume-at", type=int, default=900_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = save_tiny_checkpoint(work / "tiny", tiny_config(max_position_embeddings=2048))
        small, large = write_rows(work / "small.jsonl", 1000), write_rows(work / "large.jsonl", options.rows)
        first_steps: dict[str, list[float]] = {"small": [], "large": []}
        for number in range(options.rounds):
            for name, data in (("small", small), ("large", large)):
                first_steps[name].append(seconds_to_first_step(model, data, work / f"{name}-{number}"))
        lines = [
            f"# A file of {options.rows:,} rows and {large.stat().st_size / 1e9:.2f} GB, {date.today()}",
            "",
            f"Command: `python benchmarks/large_file.py {' '.join(sys.argv[1:])}`",
            "",
            f"* To the end of step 1: {statistics.median(first_steps['large']):.1f} s, with 1,000 rows "
            f"{statistics.median(first_steps['small']):.1f} s (medians of {options.rounds} interleaved runs).",
            *loader_lines(model, large, options.resume_at),
        ]
    text = "\n".join(lines) + "\n"
    print(text)
    (Path(__file__).parent / "results" / f"{date.today()}-large-file.md").write_text(text, encoding="utf-8")


def write_rows(path: Path, num_rows: int) -> Path:
    """Chats of varied words, about a kilobyte each."""
    rng = random.Random(0)
    words = [
        f"{a}{b}" for a in ("re", "un", "in", "over", "sub") for b in ("act", "form", "port", "tract", "dict", "ject")
    ]
    with path.open("w", encoding="utf-8") as file:
        for row in range(num_rows):
            answer = " ".join(rng.choices(words, k=rng.randint(40, 180)))[: 2 * ROW_CHARS]
            user = {"role": "user", "content": f"Question {row}: {' '.join(rng.choices(words, k=12))}?"}
            file.write(json.dumps({"messages": [user, {"role": "assistant", "content": answer}]}) + "\n")
    return path


def seconds_to_first_step(model: Path, data: Path, out: Path) -> float:
    """From the command's start until its first line of metrics."""
    command = [sys.executable, "-m", "torchtune.cli.tune", "run", "full_finetune", f"model_checkpoint={model}"]
    command += [f"dataset={data}", f"output_dir={out}", "max_steps=1", "save_last=false", f"max_seq_len={MAX_SEQ_LEN}"]
    command += ["gradient_accumulation_steps=1", "dtype=fp32"]
    start = time.monotonic()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return time.monotonic() - start


def loader_lines(model: Path, data: Path, resume_at: int) -> list[str]:
    """Train on from a window before row `resume_at` to beyond it, then go on from there anew."""
    before = private_bytes()
    loader = open_loader(model, data)
    # Every window is a function of the order alone, so this one is the same without the 15 minutes before it.
    first = resume_at - ROWS_BEFORE
    loader.load_state_dict({"epoch": 0, "window": first, "packs_consumed": 0, "rows_consumed": first})
    start, steps = time.monotonic(), 0
    iterator = iter(loader)
    while loader.rows_consumed < resume_at:
        next(iterator)
        steps += 1
    seconds, state = time.monotonic() - start, loader.state_dict()
    expected = [next(iterator) for _ in range(3)]
    memory = private_bytes() - before
    loader.close()
    del loader, iterator
    start = time.monotonic()
    with open_loader(model, data) as again:
        opened = time.monotonic() - start
        again.load_state_dict(state)
        steps_again = iter(again)
        found = [next(steps_again)]
        resumed = time.monotonic() - start
        found += [next(steps_again) for _ in range(2)]
    same = all(equal(a, b) for a, b in zip(expected, found, strict=True))
    return [
        f"* The loader's private memory at row {resume_at:,}: {memory / 1e6:.0f} MB (mapped files apart).",
        f"* Rows rendered, tokenised and packed in one process: {ROWS_BEFORE / seconds:,.0f} a second ({steps:,} steps).",
        f"* Opened, checked and resumed at row {resume_at:,} in {resumed:.1f} s, of which {opened:.1f} s to open and "
        f"check the first 20,000 rows; the next three steps are {'bit-equal' if same else 'NOT EQUAL'}.",
    ]


def open_loader(model: Path, data: Path) -> DataLoader:
    """As a recipe makes it."""
    checkpoint = open_checkpoint(str(model))
    dataset = open_dataset(
        DatasetOptions(path=str(data)), checkpoint.tokenizer(), checkpoint.chat_template, now=datetime(2026, 1, 1)
    )
    source = dataset.prepare(max_seq_len=MAX_SEQ_LEN)
    return DataLoader(
        source,
        source.sampler(seed=0, shuffle=True),
        batch_size=1,
        gradient_accumulation_steps=1,
        max_seq_len=MAX_SEQ_LEN,
        packed=True,
        seed=0,
    )


def equal(one: list[Batch], two: list[Batch]) -> bool:
    """Whether two steps have the same ids and labels."""
    return all(
        np.array_equal(a.input_ids.numpy(), b.input_ids.numpy()) and np.array_equal(a.labels.numpy(), b.labels.numpy())
        for a, b in zip(one, two, strict=True)
    )


def private_bytes() -> int:
    """Anonymous memory of this process."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
