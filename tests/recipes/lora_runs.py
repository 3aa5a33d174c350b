"""lora_finetune and export by the command line, in this process; and what comes out by transformers and PEFT."""

import copy
import json
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer
from transformers.models.auto import AutoModelForCausalLM

from tests.recipes.conftest import ROWS, labelled, metrics_of
from torchtune.cli.tune import run
from torchtune.config.parse import parse_params
from torchtune.recipes.lora_finetune import LoRAFinetuneParams, LoRAFinetuneRecipe

SGD = ("optimizer=torch.optim.SGD", "optimizer.lr=0.1", "lr_scheduler.name=constant", "clip_grad_norm=null")
FROZEN = ("optimizer=torch.optim.SGD", "optimizer.lr=0.0", "max_steps=1")


def keys_of(checkpoint, out, *keys):
    """A small run of three steps, all rows in each; later keys win."""
    return [
        *(f"model_checkpoint={checkpoint}", f"dataset={ROWS}", f"output_dir={out}", "dtype=fp32", "max_seq_len=512"),
        *(
            "batch_size=3",
            "gradient_accumulation_steps=1",
            "max_steps=3",
            "lora_rank=4",
            "lr_scheduler.num_warmup_steps=0",
        ),
        *keys,
    ]


def lora(checkpoint, out, *keys):
    """`tune run lora_finetune`; the metrics."""
    assert run(["run", "lora_finetune", *keys_of(checkpoint, out, *keys)]) == 0
    return metrics_of(Path(out))


def lora_recipe(checkpoint, out, *keys, recipe_class=LoRAFinetuneRecipe):
    """The same, and the recipe itself as it was at the end."""
    params = parse_params(LoRAFinetuneParams, keys_of(checkpoint, out, *keys))
    recipe = recipe_class(params=params)
    recipe.setup(params=params)
    recipe.train()
    recipe.cleanup()
    return recipe


def lora_in_a_process(checkpoint, out, *keys):
    """The same, for a process of its own."""
    torch.set_num_threads(1)
    raise SystemExit(run(["run", "lora_finetune", *keys_of(checkpoint, out, *keys)]))


def export(out, *keys):
    """`tune run export`; the folder."""
    assert run(["run", "export", f"output_dir={out}", *keys]) == 0
    return Path(out)


def last_step(out):
    """The newest checkpoint's folder."""
    return max(Path(out).glob("step_*"), key=lambda folder: int(folder.name[5:]))


def transformers_model(folder, dtype=torch.float32):
    """transformers' model of a folder, which must have all that it wants, and nothing else."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    wrong = {kind: names for kind, names in info.items() if names}
    assert not wrong, wrong
    return model.eval()


def peft_model(base, adapter, dtype=torch.float32):
    """PEFT's model of an adapter; a key that it misses or does not know is an error."""
    model = base if isinstance(base, torch.nn.Module) else transformers_model(base, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # PEFT says of each tied embedding that is trained that some ways to merge it would go wrong.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        return PeftModel.from_pretrained(model, adapter).eval()


@torch.no_grad()
def logits_of(model):
    """Logits of some ids."""
    result = model(torch.arange(5, 65)[None])
    return result if torch.is_tensor(result) else result.logits


@torch.no_grad()
def loss_of(model, tokenizer_folder, rows=ROWS):
    """Mean cross-entropy over the assistant's words and the token after them, by transformers' template and model."""
    total, count = 0.0, 0
    for ids, labels in labelled(AutoTokenizer.from_pretrained(tokenizer_folder), rows):
        logits = model(ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum").item()
        count += int((labels[0, 1:] != -100).sum())
    return total / count


def assert_same_logits(found, expected, share=1e-5):
    """Within `share` of the largest."""
    worst = (found - expected).abs().max() / expected.abs().max()
    assert worst <= share, f"differ by {worst:.2g} of the largest"


def first_rows(path, number):
    """A file with the first so many of the rows."""
    path.write_text("".join(ROWS.read_text().splitlines(keepends=True)[:number]))
    return path


def edited(folder, to, **changes):
    """A copy of an adapter's folder with other values in adapter_config.json."""
    to.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps(copy.deepcopy(config) | changes))
    return to
