"""The package's rows: a lower one never imports a higher one."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "torchtune"

# DESIGN's table from the top down; packages of one row may import each other.
ROWS = [
    {"cli"},
    {"recipes"},
    {"config"},
    {"training"},
    {"evaluation", "generation"},
    {"parallel"},
    {"checkpoint"},
    {"adapters", "quantization"},
    {"data"},
    {"tokenizers"},
    {"models"},
    {"modules"},
    {"distributed"},
    {"errors"},
]
HEIGHT = {name: len(ROWS) - index for index, row in enumerate(ROWS) for name in row}


def _imports(path: Path) -> list[tuple[str, int]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            module = node.module or ""
            names = [module] if module != "torchtune" else [f"torchtune.{alias.name}" for alias in node.names]
        found += [(name, node.lineno) for name in names]
    return found


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name == "errors.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_points_upwards(path):
    """A package may import its own row and those below it; `utils` is a door that nothing inside uses."""
    home = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name, line in _imports(path):
        parts = name.split(".")
        assert parts[0] != "transformers", f"{path}:{line}: transformers is an oracle for tests, never imported here"
        if parts[0] != "torchtune" or len(parts) == 1 or parts[1] == "__version__":
            continue
        if home == "utils":
            continue
        assert parts[1] != "utils", f"{path}:{line}: nothing in the package imports the door torchtune.utils"
        assert HEIGHT[parts[1]] <= HEIGHT[home], f"{path}:{line}: {home} stands below {parts[1]}"


def test_every_package_has_a_row():
    """A new package must say where it stands."""
    packages = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert packages == set(HEIGHT) - {"errors"} | {"utils"}
