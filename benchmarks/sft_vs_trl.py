"""Fine-tuning on this machine's CPU: torchtune against TRL's SFTTrainer, the same model, rows and number format.

    python benchmarks/sft_vs_trl.py --trl-python TRL_VENV/bin/python
    python benchmarks/sft_vs_trl.py --trl-python TRL_VENV/bin/python --lora-rank 16 --trl-options by-length bf16-weights

Runs are fresh processes, interleaved; medians are reported. benchmarks/README.md says what is compared.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from chat_rows import write_rows

from torchtune.checkpoint.open import open_checkpoint
from torchtune.checkpoint.save import save_model
from torchtune.models.build import build_model
from torchtune.recipes.quickstart import packaged_model
from torchtune.training.precision import dtype_name, get_dtype
from torchtune.training.throughput import matmul_rate

HERE = Path(__file__).parent
SKIPPED_STEPS = 2  # warm-up: first allocations, kernels chosen
OUR_IMPORTS = "import torchtune.recipes.lora_finetune"
TRL_IMPORTS = "import peft, datasets; from trl import SFTConfig, SFTTrainer"
BYTES_A_TRAINED_PARAMETER = 16  # itself, its gradient and AdamW's two moments, in float32


@dataclass
class Measured:
    """One run.

    Attributes:
        tokens_per_second: real tokens, after the first steps.
        first_step_s: from the process's start to the end of step 1.
        peak_bytes: largest resident memory.
        loss: of step 1.
        flops_per_second: what the model's products amount to.
    """

    tokens_per_second: float
    first_step_s: float
    peak_bytes: int
    loss: float
    flops_per_second: float


def main() -> None:
    """Measure, print a table, write it under results/."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trl-python", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--trl-batch-size", type=int, default=8)
    parser.add_argument("--trl-accumulation", type=int, default=1)
    parser.add_argument("--trl-options", nargs="*", default=[], help="e.g. packing by-length gradient-checkpointing")
    parser.add_argument("--pack-tokens", type=int, default=2048, help="of ours")
    parser.add_argument("--accumulation", type=int, default=1, help="of ours")
    parser.add_argument("--lora-rank", type=int, default=0, help="0 trains all weights, by full_finetune")
    parser.add_argument("--lora-targets", nargs="+", default=["all-linear"])
    parser.add_argument("--name", default="sft-cpu")
    options = parser.parse_args()
    dtype = get_dtype("auto")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = float32_checkpoint(work / "SmolLM2-135M-Instruct")
        messages, pairs = write_rows(work, options.rows)
        found: dict[str, list[Measured]] = {"torchtune": [], "trl": []}
        rates = []
        for number in range(options.rounds):
            rates.append(matmul_rate(dtype, torch.device("cpu")) * 1e9)
            found["torchtune"].append(run_ours(work / f"ours-{number}", model, messages, options))
            found["trl"].append(run_trl(work / f"trl-{number}.json", model, pairs, options, dtype))
            print({name: runs[-1] for name, runs in found.items()}, flush=True)
        floors = {"torchtune": floor(sys.executable, OUR_IMPORTS, model, work / "ours-0", dtype)}
        theirs = dtype if "bf16-weights" in options.trl_options else torch.float32
        floors["trl"] = floor(options.trl_python, TRL_IMPORTS, model, work / "ours-0", theirs)
    report(found, rates, dtype, options, floors if options.lora_rank else {})


def float32_checkpoint(folder: Path) -> Path:
    """The packaged model as a Hugging Face folder in float32, which both sides read."""
    checkpoint = open_checkpoint(packaged_model())
    with torch.device("meta"):
        model = build_model(checkpoint.config)
    checkpoint.load_into(model)
    for name, header in checkpoint.tensors.items():
        checkpoint.weights.headers[name] = type(header)(header.shape, torch.float32, header.file)
    save_model(folder, model, checkpoint)
    return folder


def run_ours(out: Path, model: Path, data: Path, options: argparse.Namespace) -> Measured:
    """`tune run`: each micro-batch a pack."""
    recipe = "lora_finetune" if options.lora_rank else "full_finetune"
    command = [sys.executable, "-m", "torchtune.cli.tune", "run", recipe, f"model_checkpoint={model}"]
    command += [f"dataset={data}", f"output_dir={out}", f"max_steps={options.steps}", "save_last=false"]
    command += [f"max_seq_len={options.pack_tokens}", f"gradient_accumulation_steps={options.accumulation}"]
    command += ["optimizer.lr=1e-4", "lr_scheduler.name=constant"]
    if options.lora_rank:
        command += [f"lora_rank={options.lora_rank}", f"lora_alpha={2 * options.lora_rank}"]
        command += [f"lora_targets=[{','.join(options.lora_targets)}]"]
    start, first = time.time(), 0.0
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    metrics_file = out / "metrics.jsonl"
    while not first and process.poll() is None:
        first = time.time() if metrics_file.exists() else 0.0
        time.sleep(0.005)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {command}")
    lines = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    timed = lines[SKIPPED_STEPS:]
    seconds = sum(line["seconds"] for line in timed)
    tokens, trained = sum(line["tokens"] for line in timed), sum(line["trained_tokens"] for line in timed)
    return Measured(
        tokens / seconds,
        first - start,
        usage.ru_maxrss * 1024,
        lines[0]["loss"],
        flops(model, tokens, trained, options.lora_rank > 0) / seconds,
    )


def floor(python: str, imports: str, model: Path, run: Path, dtype: torch.dtype) -> int:
    """Bytes that a LoRA run must take: what it imports, the frozen base in `dtype`, the adapter and its optimizer's."""
    process = subprocess.Popen([python, "-c", imports], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {imports}")
    config = (run / "config.yaml").read_text(encoding="utf-8")
    trained = re.search(r"trained_parameters=(\d+)", config)
    num_frozen = open_checkpoint(model).num_parameters
    return (
        usage.ru_maxrss * 1024
        + num_frozen * dtype.itemsize
        + (int(trained[1]) * BYTES_A_TRAINED_PARAMETER if trained else 0)
    )


def run_trl(out: Path, model: Path, data: Path, options: argparse.Namespace, dtype: torch.dtype) -> Measured:
    """TRL in its own environment."""
    command = [options.trl_python, str(HERE / "peers" / "trl_sft.py"), "--model", str(model), "--data", str(data)]
    command += ["--out", str(out), "--steps", str(options.steps), "--batch-size", str(options.trl_batch_size)]
    command += ["--accumulation", str(options.trl_accumulation)]
    command += ["--bf16"] if dtype == torch.bfloat16 else []
    command += ["--lora-rank", str(options.lora_rank), "--lora-targets", *options.lora_targets]
    command += [f"--{name}" for name in options.trl_options]
    start = time.time()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {command}")
    found = json.loads(out.read_text())
    ends = found["step_ends"]
    seconds = ends[-1] - ends[SKIPPED_STEPS - 1]
    tokens, trained = (sum(found[key][SKIPPED_STEPS : len(ends)]) for key in ("tokens", "trained"))
    return Measured(
        tokens / seconds,
        ends[0] - start,
        usage.ru_maxrss * 1024,
        found["losses"][0],
        flops(model, tokens, trained, options.lora_rank > 0) / seconds,
    )


def flops(model: Path, tokens: int, trained: int, is_frozen: bool) -> float:
    """6 per parameter and token in the layers, 6 per element of the head and trained token; attention is left out.

    Where the weights are frozen it is 4, and the adapter's own products are left out too.
    """
    config = json.loads((model / "config.json").read_text())
    size, inner = config["hidden_size"], config["intermediate_size"]
    kv = config["head_dim"] * config["num_key_value_heads"]
    layer = 2 * size * config["head_dim"] * config["num_attention_heads"] + 2 * size * kv + 3 * size * inner
    return (4.0 if is_frozen else 6.0) * (
        tokens * layer * config["num_hidden_layers"] + trained * size * config["vocab_size"]
    )


def report(
    found: dict[str, list[Measured]],
    rates: list[float],
    dtype: torch.dtype,
    options: argparse.Namespace,
    floors: dict[str, int],
) -> None:
    """A table for people and the numbers behind it."""
    method = "LoRA" if options.lora_rank else "Full"

    def median(name: str, key: str) -> float:
        return statistics.median(getattr(run, key) for run in found[name])

    rate = statistics.median(rates)
    lines = [
        f"# {method} fine-tuning of SmolLM2-135M-Instruct on a CPU, {datetime.date.today()}",
        "",
        f"{cpu_name()}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}, "
        f"{dtype_name(dtype)} products on float32 trained parameters; TRL: {trl_versions(options.trl_python)}.",
        f"Command: `python benchmarks/sft_vs_trl.py {' '.join(sys.argv[1:])}`".replace(
            options.trl_python, "TRL_PYTHON"
        ),
        f"Medians of {options.rounds} interleaved runs of {options.steps} steps; the matmul rate of the same runs was "
        f"{rate / 1e9:.0f} GFLOP/s.",
        "",
        "| | torchtune | TRL | ratio |",
        "| --- | --- | --- | --- |",
    ]
    rows: list[tuple[str, str, float, str]] = [
        ("real tokens per second", "tokens_per_second", 1, ".0f"),
        ("seconds from start to the end of step 1", "first_step_s", 1, ".1f"),
        ("peak memory, GB", "peak_bytes", 1e9, ".2f"),
        ("loss of step 1 (other rows on each side)", "loss", 1, ".3f"),
        ("share of the machine's matmul rate", "flops_per_second", rate, ".2f"),
    ]
    for title, key, unit, form in rows:
        ours, theirs = median("torchtune", key) / unit, median("trl", key) / unit
        lines.append(f"| {title} | {ours:{form}} | {theirs:{form}} | {ours / theirs:.2f} |")
    if floors:
        above = {name: (median(name, "peak_bytes") - floors[name]) / 1e9 for name in found}
        lines.append(
            f"| peak above imports, weights and optimizer, GB | {above['torchtune']:.2f} | {above['trl']:.2f} | "
            f"{above['torchtune'] / above['trl']:.2f} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    target = HERE / "results" / f"{datetime.date.today()}-{options.name}"
    target.with_suffix(".md").write_text(text, encoding="utf-8")
    runs: dict[str, Any] = {name: [asdict(run) for run in each] for name, each in found.items()}
    target.with_suffix(".json").write_text(
        json.dumps({"runs": runs, "matmul": rates, "floors": floors}, indent=1), encoding="utf-8"
    )


def cpu_name() -> str:
    """The processor, and whether it multiplies bf16."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}{' with AVX512-BF16' if 'avx512_bf16' in info else ''}"


def trl_versions(python: str) -> str:
    """Versions in the peer's environment."""
    code = "import importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in ('trl', 'transformers', 'torch')), sep=', ')"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    assert importlib.metadata.version("torchtune")
    main()
