"""Each shipped config is a job that runs."""

import pytest

from tests.recipes.conftest import ROWS, metrics_of
from torchtune.config.parse import parse_params
from torchtune.recipes.full_finetune import FullFinetuneParams, FullFinetuneRecipe
from torchtune.recipes.registry import configs


@pytest.mark.parametrize("name", [name for name, config in configs().items() if config.recipe == "full_finetune"])
def test_a_shipped_config_trains(checkpoint, tmp_path, name):
    """Two steps on a tiny model, from the config's own keys."""
    keys = [f"model_checkpoint={checkpoint}", f"dataset={ROWS}", f"output_dir={tmp_path}/out", "max_steps=2"]
    params = parse_params(FullFinetuneParams, ["--config", name, *keys])
    recipe = FullFinetuneRecipe(params=params)
    recipe.setup(params=params)
    recipe.train()
    recipe.cleanup()
    assert len(metrics_of(tmp_path / "out")) == 2


def test_the_written_config_gives_the_same_run_again(checkpoint, tmp_path):
    """C116: OUT/config.yaml read back is the run."""
    keys = [f"model_checkpoint={checkpoint}", f"dataset={ROWS}", "optimizer.lr=1e-3", "max_steps=3", "dtype=fp32"]
    for out, more in (("one", keys), ("two", ["--config", str(tmp_path / "one" / "config.yaml")])):
        params = parse_params(FullFinetuneParams, [*more, f"output_dir={tmp_path / out}"])
        recipe = FullFinetuneRecipe(params=params)
        recipe.setup(params=params)
        recipe.train()
        recipe.cleanup()
    losses = [[line["loss"] for line in metrics_of(tmp_path / out)] for out in ("one", "two")]
    assert losses[0] == losses[1]
