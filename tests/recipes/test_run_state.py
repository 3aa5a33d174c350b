"""What a checkpoint keeps of a run besides tensors."""

import json
from datetime import datetime
from pathlib import Path

from torchtune.recipes.full_finetune import FullFinetuneParams
from torchtune.recipes.run_state import RunState


def test_the_state_goes_through_json_and_back():
    """Everything but the length of the run, which follows the params of the run that goes on."""
    state = RunState(7, datetime(2024, 5, 6, 7, 8, 9, 10), total_epochs=3)
    for _ in range(3):
        state.count_step()
    state.best.update(2.5, 3)
    state.end_epoch(0)
    state.count_step()
    assert (state.epochs_run, state.steps_in_epoch, state.total_training_steps) == (1, 1, 4)
    other = RunState(0, datetime.now(), total_epochs=5, max_steps_per_epoch=2)
    other.load_state_dict(json.loads(json.dumps(state.state_dict())))
    state.total_epochs, state.max_steps_per_epoch = 5, 2
    assert other == state


def test_the_keys_on_disk_stay(train):
    """Checkpoints of earlier versions are resumed by these names."""
    recipe, _ = train(max_steps=1, save_last=True)
    state = json.loads((Path(recipe._params.output_dir) / "step_1" / "recipe_state" / "state.json").read_text())
    progress = {"epoch", "epochs_run", "steps_in_epoch", "total_training_steps", "dataloader", "best"}
    assert set(state) == progress | {
        *("params", "seed", "started", "dtype", "warmup_progress", "grad_scaler", "optimizer")
    }
    assert set(state["dataloader"]) == {"epoch", "window", "packs_consumed", "rows_consumed"}


def test_a_run_counted_in_steps_has_no_last_epoch(checkpoint):
    """max_steps alone ends it; with neither key there are three epochs."""
    keys = {"model_checkpoint": str(checkpoint), "dataset": "rows.jsonl"}
    assert RunState.of(FullFinetuneParams(**keys, max_steps=5)).total_epochs > 10**9
    assert RunState.of(FullFinetuneParams(**keys)).total_epochs == 3
