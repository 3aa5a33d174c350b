"""The model card of an exported folder: what it was made of, how, and how the training went.

The run is read from what lies beside its checkpoints: config.yaml and metrics.jsonl. The card has names of files and
models, never paths of the machine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from torchtune.checkpoint.hub import HUB_ID

CURVE_FILE = "loss.svg"
# What of the config a reader wants to know, in this order; where data and output lay is not among it.
SHOWN = (
    "epochs", "max_steps", "max_seq_len", "batch_size", "gradient_accumulation_steps", "packed", "optimizer",
    "lr_scheduler", "clip_grad_norm", "dtype", "param_dtype", "freeze", "new_tokens", "base_quantization", "lora_rank",
    "lora_alpha", "lora_dropout", "lora_targets", "lora_init", "use_dora", "use_rslora", "seed",
)  # fmt: skip
WIDTH, HEIGHT, MARGIN = 640, 280, 44


@dataclass(frozen=True)
class Run:
    """What a run left behind.

    Attributes:
        config: its params, resolved.
        metrics: a mapping a logged step.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def beside(cls, step_folder: Path) -> Run | None:
        """The run that wrote a checkpoint, up to that step; None where it is no run's."""
        folder = step_folder.resolve().parent
        config, metrics = folder / "config.yaml", folder / "metrics.jsonl"
        if not config.is_file() or not metrics.is_file():
            return None
        written = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
        lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines() if line.strip()]
        number = step_folder.resolve().name.removeprefix("step_")
        until = int(number) if number.isdecimal() else math.inf
        return cls(written, [line for line in lines if line["step"] <= until])


def write_card(folder: Path, *, name: str, base: str, adapters: Sequence[str], run: Run, is_adapter: bool) -> None:
    """Write README.md, and the curve where there is one to draw.

    Args:
        name: what it is called.
        base: what the model was made of, a hub id or a path, of which the name is kept.
        adapters: what was merged into it.
        run: that trained it.
        is_adapter: whether the folder is an adapter.
    """
    points = _losses(run.metrics, "loss")
    if len(points) > 1:
        (folder / CURVE_FILE).write_text(curve(points, _losses(run.metrics, "eval_loss")), encoding="utf-8")
    text = _front(base, is_adapter) + _body(name, base, adapters, run, is_adapter, has_curve=len(points) > 1)
    (folder / "README.md").write_text(text, encoding="utf-8")


def curve(losses: Sequence[tuple[float, float]], held_out: Sequence[tuple[float, float]] = ()) -> str:
    """An SVG of losses by step, (step, loss) each; held-out ones as dots."""
    steps = [step for step, _ in losses]
    values = [loss for _, loss in (*losses, *held_out)]
    low, high = min(values), max(values)
    width, height = (max(steps) - min(steps)) or 1, (high - low) or 1.0

    def place(point: tuple[float, float]) -> tuple[str, str]:
        x = MARGIN + (point[0] - min(steps)) / width * (WIDTH - 2 * MARGIN)
        y = HEIGHT - MARGIN - (point[1] - low) / height * (HEIGHT - 2 * MARGIN)
        return f"{x:.1f}", f"{y:.1f}"

    line = " ".join(",".join(place(point)) for point in losses)
    dots = "".join('<circle cx="{}" cy="{}" r="3" fill="#d62728"/>'.format(*place(point)) for point in held_out)
    label = '<text x="{}" y="{}" font-size="12" font-family="sans-serif" text-anchor="{}">{}</text>'
    labels = [
        label.format(MARGIN - 6, MARGIN + 4, "end", f"{high:.2f}"),
        label.format(MARGIN - 6, HEIGHT - MARGIN + 4, "end", f"{low:.2f}"),
        label.format(MARGIN, HEIGHT - MARGIN + 20, "middle", f"{min(steps):.0f}"),
        label.format(WIDTH - MARGIN, HEIGHT - MARGIN + 20, "middle", f"{max(steps):.0f}"),
        label.format(WIDTH / 2, HEIGHT - 8, "middle", "step"),
        label.format(WIDTH / 2, 20, "middle", "training loss" + (", held-out loss as dots" if held_out else "")),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
        f'<rect width="100%" height="100%" fill="white"/><polyline points="{line}" fill="none" stroke="#1f77b4"/>'
        f"{dots}{''.join(labels)}</svg>\n"
    )


def _front(base: str, is_adapter: bool) -> str:
    """The block that the hub reads."""
    entries: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
    }
    if HUB_ID.fullmatch(base) and not Path(base).exists():
        entries["base_model"] = base.partition("@")[0]
    entries["tags"] = ["torchtune"]
    return f"---\n{yaml.safe_dump(entries, sort_keys=False)}---\n\n"


def _body(name: str, base: str, adapters: Sequence[str], run: Run, is_adapter: bool, *, has_curve: bool) -> str:
    named = ", ".join(_name(adapter) for adapter in adapters)
    made = f"An adapter for {_name(base)}" if is_adapter else f"Made from {_name(base)}"
    made += f", with {named} merged" if adapters and not is_adapter else ""
    lines = [f"# {name}", "", f"{made}, by torchtune.", ""]
    data = _paths(run.config.get("dataset"))
    if data:
        lines += [f"Trained on {', '.join(data)}.", ""]
    if run.metrics:
        lines += ["## Result", "", *_result(run.metrics), ""]
    if has_curve:
        lines += [f"![training loss]({CURVE_FILE})", ""]
    shown = {key: run.config[key] for key in SHOWN if run.config.get(key) not in (None, [], {}, False)}
    lines += ["## Config", "", "```yaml", yaml.safe_dump(shown, sort_keys=False).rstrip(), "```", ""]
    return "\n".join(lines)


def _result(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = {
        "optimizer steps": f"{metrics[-1]['step']:,}",
        "trained tokens of the logged steps": f"{sum(line.get('trained_tokens', 0) for line in metrics):,}",
        "training loss, first and last": " and ".join(f"{line['loss']:.4f}" for line in (metrics[0], metrics[-1])),
    }
    held_out = _losses(metrics, "eval_loss")
    if held_out:
        step, loss = min(held_out, key=lambda point: point[1])
        rows["held-out loss, last and lowest"] = f"{held_out[-1][1]:.4f} and {loss:.4f} (step {step:.0f})"
    return ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())]


def _losses(metrics: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in metrics if isinstance(line.get(name), int | float)]


def _paths(dataset: Any) -> list[str]:
    """The names of the data, of one set or a mix."""
    if isinstance(dataset, str):
        return [_name(dataset)]
    if isinstance(dataset, list):
        return [name for each in dataset for name in _paths(each)]
    if isinstance(dataset, dict):
        return _paths(dataset.get("path") or dataset.get("mix") or [])
    return []


def _name(source: str) -> str:
    """A hub id as it is, of a path the last part; of a checkpoint of ours the run's too."""
    if HUB_ID.fullmatch(source) and not Path(source).exists():
        return source
    path = Path(source)
    return f"{path.parent.name}/{path.name}" if path.name.startswith("step_") else path.name
