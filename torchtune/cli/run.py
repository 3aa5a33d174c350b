"""`tune run [torchrun flags] RECIPE_OR_FILE.py [--config X] [key=value ...]`: run a recipe.

Without launch flags the recipe runs in this process. With them (`--nproc_per_node 2`) its options are
validated first, then torch's elastic agent starts the processes (torchtune/cli/agent.py).
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from argparse import Namespace
from contextlib import closing

from torchtune.cli.find import find_recipe
from torchtune.cli.load import defines_main, run_main
from torchtune.errors import ConfigError, Problem
from torchtune.recipes.registry import Entry

USAGE = """\
usage: tune run [torchrun flags] RECIPE_OR_FILE.py [--config NAME_OR_PATH] [key=value ...] [~key ...]

  tune ls                  lists the recipes
  tune run RECIPE --help   lists a recipe's keys
  --nproc_per_node N       before the recipe: N processes on this machine; other torchrun flags likewise
"""
# These say how a script is started, which is settled here.
NOT_OURS = ("module", "no_python", "run_path")
# What the agent gives each of its processes. A Kubernetes job numbers its pods by the same names.
OF_A_PROCESS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
# How long ranks that were asked to stop may save before the agent kills them.
SECONDS_TO_SAVE = 600


def run(argv: list[str]) -> int:
    """Run the recipe and return its exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if not argv[0].startswith("-"):
        return run_main(find_recipe(argv[0]), argv[1:])
    return _launch(argv)


def parse_flags(argv: list[str]) -> tuple[Namespace, int, int]:
    """torchrun's flags, a recipe's name and its arguments; and the fewest ranks and the most machines that they mean.

    Raises:
        ConfigError: a flag that can't be meant.
    """
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    parser.allow_abbrev = False  # a flag that is cut short is a mistake, as a key is
    options = parser.parse_args(argv)
    fewest_nodes, most_nodes = _num_nodes(options)
    return options, fewest_nodes * _num_processes(options), most_nodes


def _launch(argv: list[str]) -> int:
    """Validate here, so that a mistake is told once, then start the processes."""
    for name in OF_A_PROCESS:
        os.environ.pop(name, None)
    options, fewest_ranks, most_nodes = parse_flags(argv)
    recipe = find_recipe(options.training_script)
    if {"-h", "--help"} & set(options.training_script_args):
        return run_main(recipe, options.training_script_args)
    _check_place(options, most_nodes)
    _set_environment(_num_processes(options))
    if defines_main(recipe):
        from torchtune.cli.validate import validate
        from torchtune.distributed.process_group import planned_world_size

        with planned_world_size(fewest_ranks):
            validate(recipe, options.training_script_args)
    return _start(options, recipe)


def _start(options: Namespace, recipe: Entry) -> int:
    from torch.distributed.run import config_from_args

    from torchtune.cli.agent import launch

    options.training_script_args = ["run", _name(recipe), *options.training_script_args]
    options.training_script, options.module = "torchtune.cli.tune", True
    try:
        config, command, arguments = config_from_args(options)
    except (ValueError, AssertionError) as error:
        raise ConfigError(str(error), where="command line") from error
    return launch(config, command, arguments)


def _num_nodes(options: Namespace) -> tuple[int, int]:
    """The fewest and the most machines that the run may have."""
    fewest, _, most = options.nnodes.partition(":")
    try:
        numbers = int(fewest), int(most or fewest)
    except ValueError:
        numbers = 0, 0
    if not 1 <= numbers[0] <= numbers[1]:
        raise _wrong("nnodes", f"'{options.nnodes}' is no number of machines: use N, or MIN:MAX")
    return numbers


def _num_processes(options: Namespace) -> int:
    """The processes of this machine."""
    from torch.distributed.run import determine_local_world_size

    try:
        number = determine_local_world_size(options.nproc_per_node)
    except ValueError as error:
        raise _wrong(
            "nproc_per_node",
            f"'{options.nproc_per_node}' is no number of processes; use one, or auto, cpu or gpu ({error})",
        ) from error
    if number < 1:
        raise _wrong("nproc_per_node", f"{number} is no number of processes")
    return number


def _check_place(options: Namespace, most_nodes: int) -> None:
    """Refuse flags that would let the agents wait for one another in vain; a lone machine needs no place to meet.

    Raises:
        ConfigError: names the flag.
    """
    for name in NOT_OURS:
        if getattr(options, name, None):
            raise _wrong(name, "is torchrun's way to name a script; name the recipe alone")
    if options.max_restarts < 0:
        raise _wrong("max_restarts", f"{options.max_restarts} is less than none")
    has_place = options.rdzv_endpoint or options.master_port or options.master_addr != "127.0.0.1"
    if most_nodes > 1 and (options.standalone or not has_place):
        raise _wrong(
            "nnodes",
            f"{options.nnodes} machines need a place to meet: --rdzv_backend c10d --rdzv_endpoint HOST:PORT with the "
            "same values on each, HOST one of them",
        )
    if options.standalone or not has_place:
        # A free port and a name of its own: two runs on one machine do not meet.
        options.rdzv_backend, options.rdzv_endpoint, options.rdzv_id = "c10d", "localhost:0", uuid.uuid4().hex
    _check_port(options, most_nodes)


def _check_port(options: Namespace, most_nodes: int) -> None:
    """Refuse a port that something else listens on, where this machine is the one to listen there.

    Of several machines under c10d that is not known: an agent of this run may be there already.
    """
    is_static = options.rdzv_backend == "static"
    if options.master_port is None:
        options.master_port = 29500  # torchrun's
    if most_nodes > 1 and not (is_static and options.node_rank == 0):
        return
    port = str(options.master_port) if is_static and not options.rdzv_endpoint else ""
    port = port or options.rdzv_endpoint.rpartition(":")[2]
    if not port.isdecimal() or port == "0" or (not is_static and options.rdzv_backend != "c10d"):
        return
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that has just been left is free
        try:
            probe.bind(("", int(port)))
        except OSError as error:
            flag = "rdzv_endpoint" if options.rdzv_endpoint else "master_port"
            raise _wrong(
                flag, f"port {port} can't be had: {error.strerror}; leave the flag out for a free one"
            ) from error


def _set_environment(num_processes: int) -> None:
    """What the agent, its processes and their libraries read there."""
    from torchtune.distributed.attempts import LAUNCHED_AT, RESTARTED

    os.environ[LAUNCHED_AT] = time.strftime("%Y%m%d-%H%M%S")
    os.environ.pop(RESTARTED, None)
    # A store that outlives a restart, as torch shares it by default, still has the addresses of ranks that are gone.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_SAVE))
    # Which connections broke when a rank is gone is torch's own affair; that it is gone is told.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # torch would give each process one thread; the cores are there to be shared.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(_num_cores() // num_processes, 1)))


def _num_cores() -> int:
    """The cores that this process may use: a cluster may give it fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _wrong(flag: str, message: str) -> ConfigError:
    return ConfigError([Problem("command line", f"--{flag}", message)])


def _name(recipe: Entry) -> str:
    from torchtune.recipes.registry import recipes

    return recipe.name if recipe.name in recipes() and recipes()[recipe.name].path == recipe.path else str(recipe.path)
