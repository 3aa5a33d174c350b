"""`tune ls`: the recipes and configs that come with the package."""

from __future__ import annotations

from torchtune.cli.tune import parser
from torchtune.recipes.registry import configs, recipes


def run(argv: list[str]) -> int:
    """List each recipe with its configs, a line each."""
    parser("ls", "List the recipes and configs that come with the package.").parse_args(argv)
    by_recipe = configs()
    for recipe in recipes().values():
        print(f"{recipe.name:42} {recipe.summary}")
        for config in by_recipe.values():
            if config.recipe == recipe.name:
                print(f"  --config {config.name:31} {config.summary}")
    return 0
