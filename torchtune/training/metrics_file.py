"""OUT/metrics.jsonl: one JSON object a logged step, always."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends a line per logged step, each flushed at once. Not-a-number and infinities are written as null.

    Args:
        path: the file; made with its folder when the first line is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def resume_at(self, step: int) -> None:
        """Cut the lines beyond `step`, and a last line that a kill has torn."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                break  # torn by a kill; nothing whole comes after it
            if entry["step"] <= step:
                kept.append(line + "\n")
        beside = self.path.with_name(f".{self.path.name}.tmp")
        beside.write_text("".join(kept), encoding="utf-8")
        os.replace(beside, self.path)

    def log_dict(self, payload: Mapping[str, Any], step: int) -> None:
        """Write the metrics of a step."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"step": step, **{name: _strict(value) for name, value in payload.items()}}, allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def log(self, name: str, data: Any, step: int) -> None:
        """Write one metric of a step, as a line of its own."""
        self.log_dict({name: data}, step)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Nothing: the config stands in OUT/config.yaml."""

    def close(self) -> None:
        """Nothing is held open."""


def _strict(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
