"""The recipes and configs that come with the package, by name. Imports nothing heavy: `tune ls` uses it."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
CONFIGS = FOLDER / "configs"
_FOR_RECIPE = re.compile(r"^#\s*tune run (?:.*\s)?(\S+) --config (\S+)", re.MULTILINE)

# What the first library called its recipes, and what does that here. None: not yet, or not any more.
FORMER_NAMES = {
    "full_finetune_single_device": "full_finetune",
    "full_finetune_distributed": "full_finetune",
    "lora_finetune_single_device": "lora_finetune",
    "lora_finetune_distributed": "lora_finetune",
    "lora_finetune_fsdp2": "lora_finetune",
    "qat_distributed": "qat_finetune",
    "qat_single_device": "qat_finetune",
    "qat_lora_finetune_distributed": "qat_lora_finetune",
    "qat_lora_finetune_single_device": "qat_lora_finetune",
}


@dataclass(frozen=True)
class Entry:
    """A file of the package that a user can run or copy.

    Attributes:
        name: as it is typed.
        path: where it lies.
        summary: its first line.
        recipe: for a config, the recipe that it is for.
    """

    name: str
    path: Path
    summary: str
    recipe: str | None = None


def recipes() -> dict[str, Entry]:
    """The recipes: the files beside this one that have a `main`."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            summary = (ast.get_docstring(tree) or "").partition("\n")[0]
            found[path.stem] = Entry(path.stem, path, summary)
    return found


def configs() -> dict[str, Entry]:
    """The configs; the comment `# tune run RECIPE --config NAME` at a file's top says which recipe it is for."""
    found = {}
    for path in sorted(CONFIGS.rglob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(CONFIGS).with_suffix("").as_posix()
        summary = text.partition("\n")[0].lstrip("# ")
        match = _FOR_RECIPE.search(text)
        found[name] = Entry(name, path, summary, match[1] if match else None)
    return found


def recipe_of_config(path: Path) -> str | None:
    """The recipe that a config file says it is for."""
    match = _FOR_RECIPE.search(path.read_text(encoding="utf-8"))
    return match[1] if match else None
