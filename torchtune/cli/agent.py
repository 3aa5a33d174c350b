"""torch's elastic agent, with two additions: what would only fail again is not started again, and what is started
again knows it. The agent of each machine starts that machine's processes and watches them; all agents meet at the
rendezvous.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Collection
from dataclasses import fields
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousError,
    RendezvousHandler,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher.api import LaunchConfig

from torchtune.cli.rank import is_final
from torchtune.cli.tune import tell
from torchtune.distributed.attempts import RESTARTED
from torchtune.errors import ConfigError

# What these say beneath an error, the failing rank and this file have said.
QUIET = ("multiprocessing.api", "agent.server.api", "rendezvous.dynamic_rendezvous")


def launch(config: LaunchConfig, command: Callable[..., Any] | str, arguments: Collection[str]) -> int:
    """Start this machine's processes, keep them running, and return the exit status of the run.

    Returns:
        0; that of the process which failed first, 128 + n if signal n ended it; 128 + n when signal n asked to stop.
    Raises:
        ConfigError: the machines did not meet.
    """
    for name in QUIET:
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = config.signals_to_handle
    try:
        handler = _handler(config)
        result = _run_agent(_agent(config, handler, command, arguments), handler)
    except SignalException as stop:
        return 128 + stop.sigval
    except RendezvousTimeoutError as error:
        raise _not_met(config, f"they did not within {config.rdzv_configs['timeout']} s") from error
    except RendezvousError as error:
        if RESTARTED not in os.environ:  # nothing has been started
            raise _not_met(config, str(error)) from error
        tell("the run has ended on the other machines")
        return 1
    # None: another number of machines is at work, without this one.
    return 0 if result is None or result.state == WorkerState.SUCCEEDED else _status(result.failures)


def _agent(
    config: LaunchConfig,
    handler: RendezvousHandler,
    command: Callable[..., Any] | str,
    arguments: Collection[str],
) -> Agent:
    # Fields of one name mean one thing in both.
    same = {field.name: getattr(config, field.name) for field in fields(WorkerSpec) if hasattr(config, field.name)}
    spec = WorkerSpec(
        **same,
        local_world_size=config.nproc_per_node,
        entrypoint=command,
        args=tuple(arguments),
        rdzv_handler=handler,
        **_static_address(config),
    )
    optional = {"shutdown_timeout": config.shutdown_timeout} if hasattr(config, "shutdown_timeout") else {}
    options: dict[str, Any] = {
        "start_method": config.start_method,
        "log_line_prefix_template": config.log_line_prefix_template,
        **optional,  # newer than our oldest torch
    }
    assert config.logs_specs is not None, "config_from_args makes one"
    return Agent(spec, config.logs_specs, **options)


def _run_agent(agent: Agent, handler: RendezvousHandler) -> RunResult | None:
    """Run it, and close the rendezvous, except when asked to stop: the other machines may go on with another one."""
    signal.signal(signal.SIGUSR1, agent.pass_on)
    try:
        result = agent.run()
    except SignalException:
        raise
    except BaseException:
        handler.shutdown()
        raise
    handler.shutdown()
    return result


class Agent(LocalElasticAgent):
    """Starts processes again as torch's does, except after an error that is final."""

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        pids = super()._start_workers(worker_group)
        os.environ[RESTARTED] = "1"  # for those that this agent starts after these
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if not result.failures:
            return result
        if any(is_final(failure.error_file_data) for failure in result.failures.values()):
            self._remaining_restarts = 0
        elif self._remaining_restarts:
            left, of = self._remaining_restarts - 1, worker_group.spec.max_restarts
            tell(f"{_what_happened(result.failures)}; starting all again ({left} of {of} restarts left)")
        return result

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """Send a signal to the processes of this machine."""
        for worker in self.get_worker_group().workers:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                if worker.id is not None:
                    os.kill(worker.id, number)


def _handler(config: LaunchConfig) -> RendezvousHandler:
    parameters = RendezvousParameters(
        backend=config.rdzv_backend,
        endpoint=config.rdzv_endpoint,
        run_id=config.run_id,
        min_nodes=config.min_nodes,
        max_nodes=config.max_nodes,
        local_addr=config.local_addr,
        **config.rdzv_configs,
    )
    try:
        return get_rendezvous_handler(parameters)
    except ValueError as error:
        raise ConfigError(str(error), where="command line") from error


def _not_met(config: LaunchConfig, how: str) -> ConfigError:
    return ConfigError(
        f"{config.min_nodes} machines were to meet at {config.rdzv_endpoint}: {how}; is each of them started, with "
        "this --rdzv_endpoint and --rdzv_id, and is the first part of the endpoint the name of one of them?",
        key="--rdzv_endpoint",
        where="command line",
    )


def _static_address(config: LaunchConfig) -> dict[str, Any]:
    if config.rdzv_backend != "static":
        return {}
    host, port = parse_rendezvous_endpoint(config.rdzv_endpoint, default_port=29500)
    return {"master_addr": host, "master_port": port}


def _status(failures: dict[int, ProcessFailure]) -> int:
    """Say which rank failed, where no rank's own words do, and give its exit status."""
    _, first = _first(failures)
    status = first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    if not (is_final(first.error_file_data) and status > 128):  # that one was asked to stop, and did
        tell(_what_happened(failures))
    return status


def _what_happened(failures: dict[int, ProcessFailure]) -> str:
    rank, first = _first(failures)
    if first.exitcode < 0:
        return f"rank {rank} was ended by {first.signal_name()}"
    if first.error_file_data.get("told"):
        return f"rank {rank} failed first, with exit status {first.exitcode}; its message is above"
    message = first.error_file_data.get("message")
    words = message.get("message") if isinstance(message, dict) else message
    said = f": {words}" if words else ", after a rank of another machine or without a word"
    return f"rank {rank} ended with exit status {first.exitcode}{said}"


def _first(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The failure that the others follow from: one that was told, else a kill, but not the agent's own."""

    def order(entry: tuple[int, ProcessFailure]) -> tuple[bool, bool, bool, int]:
        failure = entry[1]
        return (
            not failure.error_file_data.get("told"),
            failure.exitcode == -signal.SIGTERM,
            failure.exitcode > 0,
            failure.timestamp,
        )

    return min(failures.items(), key=order)
