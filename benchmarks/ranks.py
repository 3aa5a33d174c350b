"""The same step on one rank and on several: tokens per second of each scheme, on the same machine.

    python benchmarks/ranks.py                             two ranks of one thread against one rank of two
    python benchmarks/ranks.py --device cuda --ranks 8     eight GPUs against one (not measured yet)

On the CPU the hardware is the same on both sides, so the ratio is the rate over that of one rank; on GPUs it is that
over so many GPUs. Every run trains on the same rows in steps of the same size: what one rank accumulates, data-parallel
ranks share. Runs are fresh processes, interleaved, and of each the fastest step counts: on a machine that does other
things too, that is the one least disturbed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from chat_rows import write_rows
from safetensors.torch import save_file
from sft_vs_trl import cpu_name, float32_checkpoint

from torchtune.models.build import build_model

HERE = Path(__file__).parent
SKIPPED_STEPS = 1  # first allocations; FSDP also lays out its parameters
ALONE = "one rank"
SCHEMES = {
    ALONE: [],
    "copies": ["data_parallel_replicate={ranks}"],
    "fsdp": [],
    "fsdp, layers kept": ["fsdp_reshard_after_forward=false"],
    "fsdp, summed once": ["fsdp_sum_once=true"],
    "fsdp, kept, summed once": ["fsdp_reshard_after_forward=false", "fsdp_sum_once=true"],
    "fsdp, summed in bf16": ["fsdp_reduce_dtype=bf16"],
    "fsdp, kept and in bf16": ["fsdp_reshard_after_forward=false", "fsdp_reduce_dtype=bf16"],
    "tensor parallel": ["tensor_parallel={ranks}"],
    "context parallel": ["context_parallel={ranks}"],
}


def main() -> None:
    """Measure, print a table, write it under results/."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of all ranks together, on the CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", type=Path, help="a checkpoint folder; by default the quickstart's")
    parser.add_argument(
        "--heads", type=int, help="take random weights of its sizes with so many, for tensor parallelism"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--pack-tokens", type=int, default=2048)
    parser.add_argument("--step-tokens", type=int, default=16_384, help="the recipe's own choice is up to 32,768")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--keys", nargs="*", default=[], help="of the recipe, for every run")
    parser.add_argument("--name", default="ranks")
    options = parser.parse_args()
    schemes = [ALONE] + [name for name in options.schemes if name != ALONE]
    seconds: dict[str, list[float]] = {name: [] for name in schemes}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = options.model or float32_checkpoint(work / "SmolLM2-135M-Instruct")
        if options.heads:
            model = with_other_heads(model, work / "other-heads", options.heads)
        rows, _ = write_rows(work, options.rows)
        for number in range(options.rounds):
            for index, name in enumerate(schemes):
                seconds[name] += seconds_per_token(work / f"{number}-{index}", name, model, rows, options)
                print(f"round {number + 1}, {name}: {1 / min(seconds[name]):.0f} tokens/s", flush=True)
    report(seconds, options)


def with_other_heads(source: Path, target: Path, num_heads: int) -> Path:
    """A random model of the same width and depth, with a key head for each two of its heads."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    config |= {"num_attention_heads": num_heads, "num_key_value_heads": num_heads // 2}
    config["head_dim"] = config["hidden_size"] // num_heads
    (target / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = build_model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.02)
    for file in target.glob("*.safetensors*"):
        file.unlink()
    save_file(dict(model.named_parameters()), target / "model.safetensors", metadata={"format": "pt"})
    return target


def seconds_per_token(out: Path, name: str, model: Path, rows: Path, options: argparse.Namespace) -> list[float]:
    """Of each step but the first, over all ranks."""
    ranks = 1 if name == ALONE else options.ranks
    shares_rows = name == ALONE or name.endswith("parallel")
    command = [sys.executable, "-m", "torchtune.cli.tune", "run"]
    command += ["--nproc_per_node", str(ranks)] if ranks > 1 else []
    command += ["full_finetune", f"model_checkpoint={model}", f"dataset={rows}", f"output_dir={out}"]
    command += [f"device={options.device}", f"max_steps={options.steps}", "save_last=false"]
    command += [f"max_seq_len={options.pack_tokens}", "batch_size=1"]
    packs = options.step_tokens // options.pack_tokens
    command += [f"gradient_accumulation_steps={packs if shares_rows else packs // options.ranks}"]
    command += [key.format(ranks=ranks) for key in SCHEMES[name]] + options.keys
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(options.threads // ranks, 1))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(command)}\n{done.stderr}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["seconds"] / line["tokens"] for line in lines[SKIPPED_STEPS:]]


def report(seconds: dict[str, list[float]], options: argparse.Namespace) -> None:
    """A table for people and the numbers behind it."""
    on_cpu = options.device == "cpu"
    device = f"{cpu_name()}, {options.threads} threads" if on_cpu else torch.cuda.get_device_name()
    per = 1 if on_cpu else options.ranks
    title = options.model.name if options.model else "SmolLM2-135M-Instruct"
    title += f" with {options.heads} heads" if options.heads else ""
    lines = [
        f"# {title} on {options.ranks} ranks against one, {datetime.date.today()}",
        "",
        f"{device}; Python {platform.python_version()}, torch {torch.__version__}.",
        f"Command: `python benchmarks/ranks.py {' '.join(sys.argv[1:])}`".rstrip("` ") + "`",
        f"Steps of {options.step_tokens // options.pack_tokens} packs of {options.pack_tokens:,} tokens; "
        f"{options.rounds} interleaved runs of each, "
        f"{options.steps - SKIPPED_STEPS} steps of a run count.",
        "",
        "| | tokens/s, fastest step | ratio | tokens/s, median step | ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, found in seconds.items():
        cells = []
        for of in (min, statistics.median):
            cells += [f"{1 / of(found):.0f}", f"{of(seconds[ALONE]) / of(found) / (1 if name == ALONE else per):.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    target = HERE / "results" / f"{datetime.date.today()}-{options.name}"
    target.with_suffix(".md").write_text(text, encoding="utf-8")
    target.with_suffix(".json").write_text(json.dumps(seconds, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
