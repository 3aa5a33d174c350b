"""`tune run [torchrun flags] RECIPE_OR_FILE.py [--config X] [key=value ...]`: run a recipe.

Without launch flags the recipe runs in this process. With them (`--nproc_per_node 2`) its options are
validated first, then torch's elastic agent starts the processes.
"""

from __future__ import annotations

import logging
import os
import sys
from argparse import Namespace

from torchtune.cli.find import find_recipe
from torchtune.cli.load import defines_main, run_main
from torchtune.errors import ConfigError
from torchtune.recipes.registry import Entry

USAGE = """\
usage: tune run [torchrun flags] RECIPE_OR_FILE.py [--config NAME_OR_PATH] [key=value ...] [~key ...]

  tune ls                  lists the recipes
  tune run RECIPE --help   lists a recipe's keys
  --nproc_per_node N       before the recipe: N processes on this machine; other torchrun flags likewise
"""


def run(argv: list[str]) -> int:
    """Run the recipe and return its exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if not argv[0].startswith("-"):
        return run_main(find_recipe(argv[0]), argv[1:])
    return _launch(argv)


def _launch(argv: list[str]) -> int:
    """Validate here, so that a mistake is told once, then start the processes."""
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    options = parser.parse_args(argv)
    recipe = find_recipe(options.training_script)
    if not {"-h", "--help"} & set(options.training_script_args) and defines_main(recipe):
        from torchtune.cli.validate import validate

        validate(recipe, options.training_script_args)
    if not any(argument.startswith(("--rdzv", "--standalone", "--master", "--nnodes")) for argument in argv):
        options.standalone = True  # a free port: two runs on one machine do not meet
    return _run_agent(options, recipe)


def _run_agent(options: Namespace, recipe: Entry) -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import run as run_elastic

    options.training_script_args = ["run", _name(recipe), *options.training_script_args]
    options.training_script, options.module = "torchtune.cli.tune", True
    if str(options.nproc_per_node).isdecimal():
        # torch would give each process one thread; the cores are there to be shared.
        threads = max((os.cpu_count() or 1) // int(options.nproc_per_node), 1)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # The failing rank has said what is wrong; the agent's own report would bury it.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        run_elastic(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        sys.stderr.write(f"rank {rank} failed first, with exit status {failure.exitcode}; its message is above\n")
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except ValueError as error:
        raise ConfigError(str(error), where="command line") from error
    return 0


def _name(recipe: Entry) -> str:
    from torchtune.recipes.registry import recipes

    return recipe.name if recipe.name in recipes() and recipes()[recipe.name].path == recipe.path else str(recipe.path)
