"""The folder of a run: its name, whether it may be used, and what stands in it beside the checkpoints.

OUT/config.yaml      the resolved config, the versions and the command
OUT/metrics.jsonl    a line per logged step
OUT/step_N/          a checkpoint: a complete model folder, and recipe_state/ to resume from
OUT/best             the name of the checkpoint with the lowest held-out loss
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from torchtune import __version__
from torchtune.checkpoint.steps import complete_steps, newest_step
from torchtune.config.component import instantiate
from torchtune.config.serialize import resolved, to_yaml
from torchtune.distributed.attempts import is_restarted, launched_at
from torchtune.distributed.mesh import SIZES
from torchtune.distributed.process_group import broadcast_object, is_main
from torchtune.errors import ConfigError
from torchtune.recipes.params import FinetuneParams
from torchtune.training.metric_logging import MetricLoggers, build_metric_loggers
from torchtune.training.metrics_file import MetricsFile
from torchtune.training.progress import say

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
# Keys that decide what is seen and kept, not what is trained.
WITHOUT_EFFECT = frozenset(
    [
        "output_dir",
        "resume_from_checkpoint",
        "log_every_n_steps",
        "metric_logger",
        "samples",
        "evaluation",
        "profiler",
        "num_workers",
        "device",
        "save_every_n_steps",
        "save_every_minutes",
        "save_every_epoch",
        "save_last",
        "enable_async_checkpointing",
        "keep_last",
        "save_merged",
        # How the same numbers are spread over ranks and kept in memory.
        *SIZES,
        "expert_parallel",
        "fsdp_reshard_after_forward",
        "fsdp_cpu_offload",
        "fsdp_sum_once",
        "fsdp_prefetch",
        "enable_activation_checkpointing",
        "ac_mode",
        "ac_option",
        "enable_activation_offloading",
    ]
)


class RunFolder:
    """Where a run writes. Making this object reads, and writes nothing.

    Args:
        params: the run's params; output_dir and resume_from_checkpoint decide.
        recipe: the recipe's name, for the default folder.
    Raises:
        ConfigError: the folder holds a run that would be overwritten, can't be written, or there is
            nothing to resume from.
    """

    def __init__(self, params: FinetuneParams, recipe: str) -> None:
        self.path = Path(params.output_dir or f"runs/{model_name(params.model_checkpoint)}-{recipe}-{launched_at()}")
        self.recipe = recipe
        self._last_save = time.monotonic()
        self._saved_step: int | None = None
        restarted = is_restarted()
        resume_from = self._resume_from(params.resume_from_checkpoint, restarted)
        if resume_from is None and not restarted:
            self._refuse_to_overwrite(params.resume_from_checkpoint)
        _refuse_unwritable(self.path)
        # Machines may see a shared folder's news at different times.
        self.resume_from: Path | None = broadcast_object(resume_from)

    def _resume_from(self, wish: bool | str, restarted: bool) -> Path | None:
        if restarted and (newest := newest_step(self.path)):
            return newest  # this run's own, wherever it began
        if wish is False or (wish is True and restarted):
            return None
        if isinstance(wish, str) and wish != "auto":
            return self._named_checkpoint(Path(wish))
        newest = newest_step(self.path)
        if newest is None and wish is True:
            looked = self.path / "step_*"
            there = sorted(entry.name for entry in self.path.iterdir()) if self.path.is_dir() else None
            state = f"it holds {', '.join(there)}" if there else "it is empty" if there == [] else "it does not exist"
            raise ConfigError(
                f"no complete checkpoint {looked}: {state}; resume_from_checkpoint=auto starts anew in that case",
                key="resume_from_checkpoint",
            )
        return newest

    def _named_checkpoint(self, path: Path) -> Path:
        if (path / "recipe_state").is_dir():
            return path
        steps = [f"step_{step}" for step in complete_steps(path if path.is_dir() else path.parent)]
        known = f"; complete ones there: {', '.join(steps)}" if steps else ""
        raise ConfigError(f"{path} is no checkpoint of a run{known}", key="resume_from_checkpoint")

    def _refuse_to_overwrite(self, wish: bool | str) -> None:
        has_files = any((self.path / name).exists() for name in (CONFIG_FILE, METRICS_FILE))
        if wish == "auto" or not (has_files or complete_steps(self.path)):
            return
        steps = complete_steps(self.path)
        holds = f"a run with checkpoints up to step {steps[-1]}" if steps else "a run without a checkpoint"
        raise ConfigError(
            f"{self.path} already holds {holds}; go on with it by "
            f"resume_from_checkpoint={'true' if steps else 'auto'}, or name another output_dir",
            key="output_dir",
        )

    def write_config(self, params: FinetuneParams, chosen: Mapping[str, Any]) -> None:
        """Write OUT/config.yaml: params that give this run again, under comments with versions and command. Say it too.

        Args:
            chosen: what was decided for keys that the params left open; written as comments.
        """
        going_on = f", going on from {self.resume_from}" if self.resume_from else ""
        say(f"{self.path}{going_on}: " + ", ".join(f"{name} {value}" for name, value in chosen.items()))
        if not is_main():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        header = [
            f"# tune run {self.recipe} --config {self.path / CONFIG_FILE}",
            f"# command: {shlex.join(sys.argv)}",
            f"# torchtune {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
            "# decided by this run: " + ", ".join(f"{key}={value}" for key, value in chosen.items()),
        ]
        beside = self.path / f".{CONFIG_FILE}.tmp"
        beside.write_text("\n".join(header) + "\n" + to_yaml(params), encoding="utf-8", errors="surrogateescape")
        os.replace(beside, self.path / CONFIG_FILE)

    def open_loggers(self, params: FinetuneParams, *, at_step: int) -> MetricLoggers:
        """metrics.jsonl, cut to the step that the run goes on from, and the trackers that params name.

        Raises:
            ConfigError, MissingDependencyError: a logger can't be made.
        """
        if not is_main():
            return MetricLoggers([])
        metrics_file = MetricsFile(self.path / METRICS_FILE)
        metrics_file.resume_at(at_step)
        loggers = MetricLoggers(
            [metrics_file, *build_metric_loggers(params.metric_logger, self.path / "logs", instantiate)]
        )
        loggers.log_config(resolved(params))
        return loggers

    def saved(self, step: int) -> Path:
        """Note that a step has been saved just now; returns its folder."""
        self._last_save, self._saved_step = time.monotonic(), step
        return self.path / f"step_{step}"

    def has_saved(self, step: int) -> bool:
        """Whether this step's checkpoint is there, saved by this process or resumed from."""
        return step == self._saved_step or (self.resume_from or Path()).name == f"step_{step}"

    def save_is_overdue(self, minutes: float | None) -> bool:
        """Whether the last save, or the start, lies longer back than `minutes`."""
        return minutes is not None and time.monotonic() - self._last_save > 60 * minutes


def save_is_due(params: FinetuneParams, step: int, *, epoch_ends: bool, run_ends: bool) -> bool:
    """Whether the params plan a checkpoint at this step; the clock and signals are another matter."""
    every = params.save_every_n_steps
    at_an_end = (run_ends and params.save_last) or (epoch_ends and params.save_every_epoch)
    return at_an_end or (every is not None and step % every == 0)


def comparable(params: FinetuneParams) -> dict[str, Any]:
    """The params that decide what comes out, as JSON has them; it has no infinity but its name."""
    deciding = {key: value for key, value in resolved(params).items() if key not in WITHOUT_EFFECT}
    found: dict[str, Any] = json.loads(json.dumps(deciding), parse_constant=str)
    return found


def warn_of_changes(*, before: Mapping[str, Any], params: FinetuneParams) -> None:
    """Say which keys differ from those that the checkpoint was made with."""
    now = comparable(params)
    for key in sorted(set(before) | set(now)):
        if before.get(key) != now.get(key):
            say(
                f"{key} was {before.get(key)} and is now {now.get(key)}: from here on the run is another than it "
                "would have been; the schedule follows the new params"
            )


def model_name(source: str) -> str:
    """A short name for a checkpoint's path or hub id, for folders."""
    path = Path(source)
    name = path.stem if path.suffix == ".gguf" else path.name or path.resolve().name
    # A checkpoint of ours is called step_N; the run that it belongs to says more.
    return f"{path.resolve().parent.name}-{name}" if name.startswith("step_") else name


def _refuse_unwritable(path: Path) -> None:
    existing = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
    if not existing.is_dir():
        raise ConfigError(f"{existing} is a file, so {path} can't be made", key="output_dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{existing} can't be written to by this user", key="output_dir")
