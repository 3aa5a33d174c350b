"""A recipe on the ranks of a pool, in schemes of all kinds, to be compared with one rank."""

from pathlib import Path

import torch

from tests.recipes.conftest import metrics_of
from torchtune.config.parse import parse_params
from torchtune.recipes.full_finetune import FullFinetuneParams, FullFinetuneRecipe
from torchtune.recipes.lora_finetune import LoRAFinetuneParams, LoRAFinetuneRecipe

RECIPES = {
    "full_finetune": (FullFinetuneParams, FullFinetuneRecipe),
    "lora_finetune": (LoRAFinetuneParams, LoRAFinetuneRecipe),
}


def train(recipe_name, keys):
    """Run a recipe; returns the lines of metrics, and the rows of each step that this rank has read."""
    params_class, recipe_class = RECIPES[recipe_name]
    params = parse_params(params_class, list(keys))
    recipe = recipe_class(params=params)
    recipe.setup(params=params)
    rows, steps_of_epoch = [], recipe._upkeep.steps_of_epoch

    def watched(epoch):
        for micro_batches in steps_of_epoch(epoch):
            rows.append(sorted(row for batch in micro_batches for row in batch.rows))
            yield micro_batches

    recipe._upkeep.steps_of_epoch = watched
    recipe.train()
    data_rank, shares_rows = recipe._mesh.data.rank, (recipe._mesh.context.rank, recipe._mesh.tensor.rank) != (0, 0)
    recipe.cleanup()
    return metrics_of(Path(params.output_dir)), data_rank, None if shares_rows else rows


def rows_of_steps(results):
    """The rows of each step on all ranks together, those that share them once."""
    by_rank = [rows for _, _, rows in results if rows is not None]
    return [sorted(row for rows in step for row in rows) for step in zip(*by_rank, strict=True)]


def same_tensors(one, other, *, atol, rtol=0.0):
    """Whether two dictionaries of tensors agree; says where they differ most."""
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            other[name], one[name], atol=atol, rtol=rtol, msg=lambda text, n=name: f"{n}: {text}"
        )
