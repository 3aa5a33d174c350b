"""`tune cp NAME DESTINATION`: copy a recipe or config, which then runs from where it was copied."""

from __future__ import annotations

import shutil
from pathlib import Path

from torchtune.cli.find import find_shipped
from torchtune.cli.tune import parser
from torchtune.errors import ConfigError


def run(argv: list[str]) -> int:
    """Copy a shipped file; a missing suffix is added."""
    arguments = parser("cp", "Copy a recipe or config of the package.")
    arguments.add_argument("name", help="a name of `tune ls`")
    arguments.add_argument("destination", type=Path, help="a file or folder")
    arguments.add_argument("-n", "--no-clobber", action="store_true", help="leave a file that exists as it is")
    arguments.add_argument("--make-parents", action="store_true", help="make missing folders")
    options = arguments.parse_args(argv)
    source = find_shipped(options.name).path
    target: Path = options.destination
    if target.is_dir():
        target = target / source.name
    elif target.suffix != source.suffix:
        target = target.with_name(target.name + source.suffix)
    if target.exists() and options.no_clobber:
        print(f"{target} exists and is left as it is")
        return 0
    if not target.parent.is_dir():
        if not options.make_parents:
            raise ConfigError(f"there is no folder {target.parent}; --make-parents makes it", where="command line")
        target.parent.mkdir(parents=True)
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise ConfigError(f"{target} can't be written: {error.strerror}", where="command line") from error
    print(f"copied to {target}")
    return 0
