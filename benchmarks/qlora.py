"""LoRA over a base in NF4, int8 and int4 against the same over the dense base: losses, peak memory, tokens per second.

    python benchmarks/qlora.py

The base is a small model trained here in float32 first: weights that once were 4-bit blocks, like those of the
quickstart's model, would lose nothing by being rounded again. benchmarks/README.md says more.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from chat_rows import write_rows
from safetensors.torch import save_file
from sft_vs_trl import cpu_name

from torchtune.checkpoint.open import open_checkpoint
from torchtune.models.build import build_model
from torchtune.recipes.quickstart import packaged_model
from torchtune.training.precision import dtype_name, get_dtype

KINDS = ("none", "nf4", "int8", "int4")
SIZES = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}


@dataclass
class Run:
    """One LoRA run.

    Attributes:
        losses: of each step.
        base_bytes: what the frozen base takes in memory.
        peak_bytes: largest resident memory of the process.
        tokens_per_second: median over the steps.
    """

    losses: list[float]
    base_bytes: int
    peak_bytes: int
    tokens_per_second: float


def main() -> None:
    """Train a base, then adapters over it; print a table and write it under results/."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--name", default="qlora")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        random_checkpoint(work / "random")
        text = library_text(work / "library.txt")
        base = tune(
            "full_finetune", work / "base", model_checkpoint=work / "random", dataset=text, max_steps=options.base_steps
        )
        messages, _ = write_rows(work, 2048)
        runs = {}
        for kind in KINDS:
            out = work / kind
            step = tune(
                "lora_finetune",
                out,
                model_checkpoint=base,
                dataset=messages,
                max_steps=options.steps,
                base_quantization=kind,
            )
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            runs[kind] = Run(
                [line["loss"] for line in lines],
                held_bytes(base, kind),
                max(line["peak_memory_bytes"] for line in lines),
                statistics.median(line["tokens_per_second"] for line in lines[2:]),
            )
            print(step, runs[kind].losses[::7], flush=True)
        first = [json.loads(line)["loss"] for line in (work / "base" / "metrics.jsonl").read_text().splitlines()]
    report(runs, first, options)


def random_checkpoint(folder: Path) -> None:
    """A random Llama with the packaged model's tokenizer and template."""
    source = open_checkpoint(packaged_model())
    config = {**source.config, **SIZES, **HEADS, "dtype": "float32"}
    config.pop("torch_dtype", None)
    torch.manual_seed(0)
    model = build_model(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in source.files.items():
        (folder / name).write_bytes(content)


def library_text(path: Path) -> Path:
    """The sources of Python's library, some 10 MB of text."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    path.write_text("\n\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in files), encoding="utf-8")
    return path


def tune(recipe: str, out: Path, **keys: Any) -> Path:
    """Run a recipe; returns its last checkpoint."""
    keys |= {"output_dir": out, "max_seq_len": 512, "gradient_accumulation_steps": 2, "save_every_minutes": "null"}
    keys |= {"optimizer.lr": 1e-3, "lr_scheduler.name": "cosine"}
    if recipe == "full_finetune":
        keys |= {"dataset": f"{{path: {keys['dataset']}, sample_by: paragraph}}"}
    command = [sys.executable, "-m", "torchtune.cli.tune", "run", recipe, *(f"{k}={v}" for k, v in keys.items())]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out / f"step_{keys['max_steps']}"


def held_bytes(base: Path, kind: str) -> int:
    """What the frozen base takes in memory, as the recipe holds it."""
    from torchtune.adapters.base_weights import BaseWeights
    from torchtune.modules.packed import PackedWeight
    from torchtune.quantization.kinds import packable, packer

    checkpoint = open_checkpoint(base)
    with torch.device("meta"):
        model = build_model(checkpoint.config).requires_grad_(False)
    pack = None if kind == "none" else packer(kind)
    dtype = get_dtype("auto")
    place = BaseWeights(model, dtype=dtype, trained_dtype=dtype, pack=pack, packable=packable(model) if pack else ())
    checkpoint.load_into(model, place=place)
    return sum(p.held_bytes if isinstance(p, PackedWeight) else p.nbytes for p in model.parameters())


def report(runs: dict[str, Run], first: list[float], options: argparse.Namespace) -> None:
    """A table for people."""
    dense = runs["none"]
    lines = [
        f"# LoRA over quantised bases on a CPU, {datetime.date.today()}",
        "",
        f"{cpu_name()}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}, "
        f"{dtype_name(get_dtype('auto'))} products.",
        f"Command: `python benchmarks/qlora.py {' '.join(sys.argv[1:])}`. The base: {SIZES}, trained from random weights "
        f"for {len(first)} steps of 1,024 tokens, loss {first[0]:.2f} to {statistics.mean(first[-10:]):.2f}. The adapter: rank "
        f"16 on all linear layers, {options.steps} steps.",
        "",
        "| base | mean loss | last ten | mean, against dense | base, MB | process, peak GB | tokens/s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind, run in runs.items():
        mean, last = statistics.mean(run.losses), statistics.mean(run.losses[-10:])
        lines.append(
            f"| {kind} | {mean:.4f} | {last:.4f} | {mean / statistics.mean(dense.losses) - 1:+.2%} | "
            f"{run.base_bytes / 1e6:.1f} | {run.peak_bytes / 1e9:.2f} | {run.tokens_per_second:.0f} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    target = Path(__file__).parent / "results" / f"{datetime.date.today()}-{options.name}.md"
    target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
