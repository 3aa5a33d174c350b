"""`tune cat NAME`: print a recipe or config."""

from __future__ import annotations

from pathlib import Path

from torchtune.cli.find import SUFFIXES, find_shipped
from torchtune.cli.tune import parser


def run(argv: list[str]) -> int:
    """Print a shipped file by name, or a local one by path."""
    arguments = parser("cat", "Print a recipe or config of the package, or a local file.")
    arguments.add_argument("name", help="a name of `tune ls`, or a path")
    name = arguments.parse_args(argv).name
    path = Path(name)
    if not (path.suffix in SUFFIXES and path.is_file()):
        path = find_shipped(name).path
    print(path.read_text(encoding="utf-8"), end="")
    return 0
