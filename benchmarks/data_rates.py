"""What the data layer is worth: tokenising rate, packing, and training speed of packs against padding.

    python benchmarks/data_rates.py

Rows are questions about Python's own library, answered by its docstrings (chat_rows.py).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from chat_rows import write_rows

from torchtune.checkpoint.open import open_checkpoint
from torchtune.data.dataset import open_dataset
from torchtune.data.inspection.statistics import statistics
from torchtune.data.options import DatasetOptions
from torchtune.recipes.quickstart import packaged_model

MAX_SEQ_LEN = 2048
SKIPPED_STEPS = 2


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = "1"  # rates are per core
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data, _ = write_rows(work, options.rows)
        checkpoint = open_checkpoint(packaged_model())
        dataset = open_dataset(DatasetOptions(path=str(data)), checkpoint.tokenizer(), checkpoint.chat_template)
        start = time.perf_counter()
        prepared = dataset.prepare(max_seq_len=MAX_SEQ_LEN)
        seconds = time.perf_counter() - start
        counted = statistics(prepared.checked_samples(), pack_tokens=MAX_SEQ_LEN)
        packed = train(work / "packed", data, options.steps, "packed=true", f"max_seq_len={MAX_SEQ_LEN}")
        padded = train(work / "padded", data, options.steps, "packed=false", "batch_size=8")
    lines = [
        f"# Data rates, {date.today()}",
        "",
        f"Command: `python benchmarks/data_rates.py {' '.join(sys.argv[1:])}`".rstrip("` ") + "`",
        "",
        f"* Rendered, tokenised and proven on one core: {prepared.num_rows / seconds:,.0f} rows and "
        f"{counted.num_tokens / seconds:,.0f} tokens a second ({prepared.num_rows:,} rows).",
        f"* Packs of {MAX_SEQ_LEN:,} tokens are {counted.packed_share:.1%} real tokens; padded batches of 8 rows "
        f"{counted.padded_share:.1%}.",
        f"* Training SmolLM2-135M: {packed:.0f} real tokens a second in packs, {padded:.0f} with packed=false in rows of 8 "
        f"({packed / padded:.2f} times): neither computes padding, since rows lie on one axis of tokens.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    (Path(__file__).parent / "results" / f"{date.today()}-data-rates.md").write_text(text, encoding="utf-8")


def train(out: Path, data: Path, steps: int, *keys: str) -> float:
    """Real tokens per second of a short run."""
    command = [
        sys.executable,
        "-m",
        "torchtune.cli.tune",
        "run",
        "full_finetune",
        f"model_checkpoint={packaged_model()}",
    ]
    command += [f"dataset={data}", f"output_dir={out}", f"max_steps={steps}", "save_last=false"]
    command += ["gradient_accumulation_steps=1", *keys]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, env={**os.environ, "RAYON_NUM_THREADS": "2"})
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][SKIPPED_STEPS:]
    return sum(line["tokens"] for line in lines) / sum(line["seconds"] for line in lines)


if __name__ == "__main__":
    main()
