"""metrics.jsonl and the trackers, each read back by its own library."""

import json
import math

import pytest

from torchtune.config.component import instantiate
from torchtune.errors import ConfigError, MissingDependencyError
from torchtune.training.metric_logging import DiskLogger, MetricLoggers, build_metric_loggers
from torchtune.training.metrics_file import MetricsFile


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_case_c124_resume_cuts_and_nan_is_null(tmp_path):
    """Lines beyond the step and a torn one go; what is no number is null, for strict readers."""
    file = MetricsFile(tmp_path / "out" / "metrics.jsonl")
    for step in (1, 2, 3):
        file.log_dict({"loss": math.nan if step == 1 else 1.0 / step, "grad_norm": math.inf}, step)
    with file.path.open("a") as stream:
        stream.write('{"step": 4, "lo')
    file.resume_at(2)
    file.log_dict({"loss": 5.0}, 3)
    assert [line["step"] for line in lines(file.path)] == [1, 2, 3]
    assert lines(file.path)[0] == {"step": 1, "loss": None, "grad_norm": None}
    assert [entry.name for entry in file.path.parent.iterdir()] == ["metrics.jsonl"]


def test_several_loggers_at_once(tmp_path, capsys):
    """Names, components and lists."""
    disk = {
        "_component_": "torchtune.training.metric_logging.DiskLogger",
        "log_dir": str(tmp_path),
        "filename": "a.txt",
    }
    loggers = MetricLoggers(build_metric_loggers(["stdout", disk], tmp_path, instantiate))
    loggers.log_dict({"loss": 1.5, "lr": 0.1}, 7)
    loggers.close()
    loggers.close()
    assert capsys.readouterr().out == "Step 7 | loss:1.5 lr:0.1\n"
    assert (tmp_path / "a.txt").read_text() == "Step 7 | loss:1.5 lr:0.1\n"


def test_an_unknown_logger_is_refused(tmp_path):
    """With the nearest name."""
    with pytest.raises(ConfigError, match="did you mean 'wandb'"):
        build_metric_loggers("wandbb", tmp_path, instantiate)


def test_a_missing_library_names_the_extra(tmp_path, monkeypatch):
    """At setup, not at the end of a run."""
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(MissingDependencyError, match=r"\[wandb\]"):
        build_metric_loggers("wandb", tmp_path, instantiate)


def test_tensorboard(tmp_path):
    """Scalars as TensorBoard reads them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (logger,) = build_metric_loggers("tensorboard", tmp_path, instantiate)
    logger.log_config({"lr": 1})
    for step in (1, 2):
        logger.log_dict({"loss": 1.0 / step}, step)
    logger.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 0.5)]


def test_mlflow_goes_on_with_the_same_run(tmp_path):
    """A local store; a second logger of the same folder adds to the first one's run."""
    tracking = pytest.importorskip("mlflow.tracking")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    from torchtune.training.metric_logging import MLflowLogger

    for step in (1, 2):
        logger = MLflowLogger(tracking_uri=uri, log_dir=str(tmp_path))
        logger.log_config({"lr": 0.1})
        logger.log_dict({"loss": 1.0 / step}, step)
        logger.close()
    history = tracking.MlflowClient(tracking_uri=uri).get_metric_history(logger.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 0.5)]


def test_wandb_offline(tmp_path):
    """Without a network: a run's folder with its id, kept for a resume."""
    pytest.importorskip("wandb")
    from torchtune.training.metric_logging import WandBLogger

    logger = WandBLogger(log_dir=str(tmp_path), mode="offline")
    logger.log_config({"lr": 0.1})
    logger.log_dict({"loss": 1.0}, 1)
    logger.close()
    kept = (tmp_path / ".tracker_run_wandb").read_text()
    assert list(tmp_path.glob(f"wandb/offline-run-*-{kept}"))


def test_disk_logger_keeps_what_was_there(tmp_path):
    """A second run in the same folder appends."""
    for _ in range(2):
        logger = DiskLogger(str(tmp_path), "log.txt")
        logger.log("loss", 2.0, 1)
        logger.close()
    assert (tmp_path / "log.txt").read_text() == "Step 1 | loss:2.0\n" * 2
