"""Metric loggers: the small interface behind which trackers stand, and how a run gets the ones it names."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torchtune.errors import ConfigError, MissingDependencyError, did_you_mean

RUN_ID_FILE = ".tracker_run"


class MetricLogger(Protocol):
    """What a recipe asks of a logger; values are plain numbers."""

    def log(self, name: str, data: float, step: int) -> None:
        """Record one metric of a step."""

    def log_dict(self, payload: Mapping[str, float], step: int) -> None:
        """Record the metrics of a step."""

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Record what the run is."""

    def close(self) -> None:
        """Finish; nothing is logged after it."""


class _Lines:
    """`Step <n> | name:value name:value`, written by `write`."""

    def __init__(self, write: Callable[[str], Any]) -> None:
        self._write = write

    def log(self, name: str, data: float, step: int) -> None:
        self.log_dict({name: data}, step)

    def log_dict(self, payload: Mapping[str, float], step: int) -> None:
        self._write(f"Step {step} | " + " ".join(f"{name}:{value}" for name, value in payload.items()) + "\n")

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Nothing: lines hold metrics alone."""

    def close(self) -> None:
        """Nothing is held open."""


class StdoutLogger(_Lines):
    """A line a step on standard output."""

    def __init__(self) -> None:
        super().__init__(sys.stdout.write)


class DiskLogger(_Lines):
    """A line a step in a text file.

    Args:
        log_dir: its folder.
        filename: by default `log_<unix time>.txt`.
    """

    def __init__(self, log_dir: str, filename: str | None = None) -> None:
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        self._file = (Path(log_dir) / (filename or f"log_{int(time.time())}.txt")).open("a", encoding="utf-8")
        super().__init__(self._file.write)

    def log_dict(self, payload: Mapping[str, float], step: int) -> None:
        super().log_dict(payload, step)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardLogger:
    """Scalars for TensorBoard under `log_dir`."""

    def __init__(self, log_dir: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingDependencyError("tensorboard", extra="tensorboard", needed_for="TensorBoardLogger") from error
        self._writer = SummaryWriter(log_dir=log_dir)

    def log(self, name: str, data: float, step: int) -> None:
        """Record one metric of a step."""
        self._writer.add_scalar(name, data, global_step=step)

    def log_dict(self, payload: Mapping[str, float], step: int) -> None:
        """Record the metrics of a step."""
        for name, value in payload.items():
            self.log(name, value, step)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Record the config as text."""
        self._writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in config.items()))

    def close(self) -> None:
        """Write what is left and close."""
        self._writer.close()


class WandBLogger:
    """Weights & Biases. After a resume the same run goes on: its id is kept under `log_dir`.

    Args:
        project, entity, group: where the run is filed.
        log_dir: where its files go.
        rest: for `wandb.init`; `mode="offline"` needs no network.
    """

    def __init__(
        self,
        project: str = "torchtune",
        entity: str | None = None,
        group: str | None = None,
        log_dir: str | None = None,
        **rest: Any,
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingDependencyError("wandb", extra="wandb", needed_for="WandBLogger") from error
        folder = Path(log_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        rest.setdefault("id", _kept_run_id(folder, "wandb", lambda: secrets.token_hex(4)))
        rest.setdefault("resume", "allow")
        self._run = wandb.init(project=project, entity=entity, group=group, dir=str(folder), **rest)

    def log(self, name: str, data: float, step: int) -> None:
        """Record one metric of a step."""
        self.log_dict({name: data}, step)

    def log_dict(self, payload: Mapping[str, float], step: int) -> None:
        """Record the metrics of a step."""
        self._run.log({**payload, "global_step": step}, step=step)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Record what the run is."""
        self._run.config.update(dict(config), allow_val_change=True)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MLflowLogger:
    """MLflow. After a resume the same run goes on: its id is kept under `log_dir`.

    Args:
        experiment_name: where the run is filed.
        tracking_uri: the store; by default MLflow's own choice.
        run_id, run_name: an existing run to go on with, or the new one's name.
        log_dir: where the run's id is kept.
    """

    def __init__(
        self,
        experiment_name: str = "torchtune",
        tracking_uri: str | None = None,
        run_id: str | None = None,
        run_name: str | None = None,
        log_dir: str | None = None,
    ) -> None:
        try:
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise MissingDependencyError("mlflow", extra="mlflow", needed_for="MLflowLogger") from error
        self._client = MlflowClient(tracking_uri=tracking_uri)
        found = self._client.get_experiment_by_name(experiment_name)
        experiment = found.experiment_id if found else self._client.create_experiment(experiment_name)

        def create() -> str:
            return str(self._client.create_run(experiment, run_name=run_name).info.run_id)

        folder = Path(log_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        self.run_id = run_id or _kept_run_id(folder, "mlflow", create)

    def log(self, name: str, data: float, step: int) -> None:
        """Record one metric of a step."""
        self._client.log_metric(self.run_id, name, data, step=step)

    def log_dict(self, payload: Mapping[str, float], step: int) -> None:
        """Record the metrics of a step."""
        for name, value in payload.items():
            self.log(name, value, step)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Record the config, key by key; a key that the run has already keeps its value."""
        known = self._client.get_run(self.run_id).data.params
        for key, value in config.items():
            if key not in known:
                self._client.log_param(self.run_id, key, str(value)[:6000])

    def close(self) -> None:
        """Finish the run."""
        self._client.set_terminated(self.run_id)


class CometLogger:
    """Comet. `online=False` writes an archive under `log_dir` that can be uploaded later.

    Args:
        api_key, workspace, project: where the run is filed; Comet's own settings where not given.
        experiment_key: the run to go on with; by default the one kept under `log_dir`.
        rest: for `comet_ml.start`.
    """

    def __init__(
        self,
        api_key: str | None = None,
        workspace: str | None = None,
        project: str | None = None,
        experiment_key: str | None = None,
        mode: str | None = None,
        online: bool | None = None,
        log_dir: str | None = None,
        **rest: Any,
    ) -> None:
        try:
            import comet_ml
        except ImportError as error:
            raise MissingDependencyError("comet_ml", extra="comet", needed_for="CometLogger") from error
        folder = Path(log_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        config = comet_ml.ExperimentConfig(offline_directory=str(folder), **rest)
        self._experiment = comet_ml.start(
            api_key=api_key,
            workspace=workspace,
            project=project,
            experiment_key=experiment_key or _kept_run_id(folder, "comet", comet_ml.generate_guid),
            mode=mode,
            online=online,
            experiment_config=config,
        )

    def log(self, name: str, data: float, step: int) -> None:
        """Record one metric of a step."""
        self._experiment.log_metric(name, data, step=step)

    def log_dict(self, payload: Mapping[str, float], step: int) -> None:
        """Record the metrics of a step."""
        self._experiment.log_metrics(dict(payload), step=step)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Record what the run is."""
        self._experiment.log_parameters(dict(config))

    def close(self) -> None:
        """Finish the run."""
        self._experiment.end()


class MetricLoggers:
    """Several loggers as one."""

    def __init__(self, loggers: Sequence[MetricLogger]) -> None:
        self._loggers = list(loggers)

    def log(self, name: str, data: float, step: int) -> None:
        """Record one metric of a step."""
        self.log_dict({name: data}, step)

    def log_dict(self, payload: Mapping[str, float], step: int) -> None:
        """Record the metrics of a step."""
        for logger in self._loggers:
            logger.log_dict(payload, step)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Record what the run is."""
        for logger in self._loggers:
            logger.log_config(config)

    def close(self) -> None:
        """Finish all; a second call does nothing."""
        loggers, self._loggers = self._loggers, []
        for logger in loggers:
            logger.close()


LOGGERS: dict[str, Callable[..., MetricLogger]] = {
    "stdout": StdoutLogger,
    "disk": DiskLogger,
    "tensorboard": TensorBoardLogger,
    "wandb": WandBLogger,
    "mlflow": MLflowLogger,
    "comet": CometLogger,
}


def build_metric_loggers(
    wish: Any, log_dir: Path, build_component: Callable[[Mapping[str, Any]], MetricLogger]
) -> list[MetricLogger]:
    """The loggers that `metric_logger` names.

    Args:
        wish: None, a name of LOGGERS, a component, or a list of these.
        log_dir: the folder for those that write files.
        build_component: makes a logger from a mapping with `_component_`.
    Raises:
        ConfigError: another name.
        MissingDependencyError: the tracker's library is not installed.
    """
    if wish is None:
        return []
    loggers: list[MetricLogger] = []
    for entry in wish if isinstance(wish, Sequence) and not isinstance(wish, str) else [wish]:
        if isinstance(entry, Mapping):
            loggers.append(build_component(entry))
        elif entry in LOGGERS:
            loggers.append(LOGGERS[entry](**({} if entry == "stdout" else {"log_dir": str(log_dir)})))
        else:
            raise ConfigError(f"'{entry}' is no logger{did_you_mean(str(entry), LOGGERS)}", key="metric_logger")
    return loggers


def _kept_run_id(folder: Path, tracker: str, make: Callable[[], str]) -> str:
    """The id of this run at a tracker: kept in a file, so that a resumed run is the same one there."""
    file = folder / f"{RUN_ID_FILE}_{tracker}"
    if not file.exists():
        file.write_text(make(), encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()
