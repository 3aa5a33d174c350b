"""`tune ls`: the recipes and configs that come with the package, or the models that it knows."""

from __future__ import annotations

from torchtune.cli.tune import parser
from torchtune.recipes.registry import configs, recipes


def run(argv: list[str]) -> int:
    """List each recipe with its configs, or each family of models, a line each."""
    arguments = parser("ls", "List the recipes and configs that come with the package.")
    arguments.add_argument("--models", action="store_true", help="list the families of models instead")
    if arguments.parse_args(argv).models:
        return _list_models()
    by_recipe = configs()
    for recipe in recipes().values():
        print(f"{recipe.name:42} {recipe.summary}")
        for config in by_recipe.values():
            if config.recipe == recipe.name:
                print(f"  --config {config.name:31} {config.summary}")
    return 0


def _list_models() -> int:
    from torchtune.checkpoint.gguf_architectures import MODEL_TYPES
    from torchtune.models.build import families

    for family in families():
        gguf = "safetensors, gguf" if family.model_type in MODEL_TYPES else "safetensors"
        print(f"{family.model_type:18} {gguf:18} {family.covers}")
    print("\nAll train, pack and decode with a cache; docs/models.md has the table. Any size: config.json says it.")
    return 0
