"""The founding text's example script, with imports added, runs as it stands there."""

import subprocess
import sys

from tests.recipes.conftest import ROWS

SCRIPT = """
from torchtune import utils
from torchtune.recipes.full_finetune import FullFinetuneParams, FullFinetuneRecipe
from torchtune.utils import init_process_group

# Launch using TuneCLI which uses TorchRun under the hood
parser = utils.TuneArgumentParser()

# Parse and validate the params
args, _ = parser.parse_known_args()
args = vars(args)
recipe_params = FullFinetuneParams(**args)

# Env variables set by torch run; only need to initialize process group
init_process_group(backend="nccl")

# Setup the recipe and train the model
recipe = FullFinetuneRecipe(params=recipe_params)
recipe.setup(params=recipe_params)
recipe.train()
recipe.cleanup()

# Other stuff to do after training is complete
assert utils.get_device("cpu").type == "cpu"
assert str(utils.get_dtype("bf16")) == "torch.bfloat16"
for name in "_device _dtype _model _tokenizer _optimizer _loss_fn _sampler _dataloader _autocast metric_loggers".split():
    assert hasattr(recipe, name), name
for name in "epochs_run total_epochs total_training_steps _resume_from_checkpoint _log_every_n_steps".split():
    assert hasattr(recipe, name), name
folder = recipe.save_checkpoint(epoch=0)
assert recipe.load_checkpoint(ckpt_path=folder)["checkpoint"].config["model_type"] == "llama"
"""


def test_the_example_script_runs(checkpoint, tmp_path):
    """By --config and --override, and by bare key=value; the command line wins over the YAML."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    config = tmp_path / "config.yaml"
    config.write_text(f"model_checkpoint: {checkpoint}\ndataset: {ROWS}\nmax_steps: 100\n")
    arguments = ["--config", config, "--override", "max_steps=2", f"output_dir={tmp_path}/out", "seed=1"]
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "metrics.jsonl").read_text().count("\n") == 2
