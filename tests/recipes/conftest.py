"""What the recipes' tests share: a tiny checkpoint, rows, and a way to run the recipe in this process."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_config
from torchtune.recipes.full_finetune import FullFinetuneParams, FullFinetuneRecipe

CASES = Path(__file__).parent.parent / "cases"
ROWS = CASES / "common_rows24.jsonl"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny Llama checkpoint in fp32."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-llama")


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    """A tiny chat model that says different things, and one token of which stops it."""
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("ask") / "tiny", tiny_config(max_position_embeddings=256))
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        tensors[name] = torch.randn(tensor.shape, generator=generator) * (0.3 if tensor.dim() > 1 else 0.1) + (
            tensor.dim() == 1
        )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def train(checkpoint, tmp_path):
    """Run full_finetune with these keys over the defaults of a small test; returns the recipe and its metrics."""

    def run(recipe_class=FullFinetuneRecipe, **keys):
        values = {
            "model_checkpoint": str(checkpoint),
            "dataset": {"path": str(ROWS)},
            "output_dir": str(tmp_path / "out"),
            "dtype": "fp32",
            "gradient_accumulation_steps": 1,
            "max_seq_len": 256,
            "save_last": False,
        }
        params = FullFinetuneParams(**(values | keys))
        recipe = recipe_class(params=params)
        recipe.setup(params=params)
        recipe.train()
        recipe.cleanup()
        return recipe, metrics_of(Path(params.output_dir))

    return run


def metrics_of(output_dir):
    """The lines of metrics.jsonl, read strictly."""

    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def labelled(tokenizer, rows):
    """Token ids [1, T] of each row by transformers' template, and labels: the assistant's words and the token after."""
    for line in Path(rows).read_text().splitlines():
        messages = json.loads(line)["messages"]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        ids = torch.tensor([encoding["input_ids"]])
        labels = torch.full_like(ids, -100)
        position = 0
        for message in messages:
            start = text.index(message["content"], position)
            position = start + len(message["content"]) + len("<|im_end|>")
            if message["role"] == "assistant":
                inside = [start <= s and e <= position and e > s for s, e in encoding["offset_mapping"]]
                labels[0, inside] = ids[0, inside]
        yield ids, labels
