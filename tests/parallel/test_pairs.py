"""What docs/distributed.md says goes together does, and what it says is refused is."""

import itertools

import pytest
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig

from tests.parallel.pairs import BEGIN, DATA_RANKS, DOCUMENT, END, FACTORS, NUM_RANKS, REFUSED, covering_rows, table
from tests.recipes.conftest import ROWS
from tests.recipes.many_ranks import RECIPES, same_tensors, train
from tests.tiny_checkpoint import VOCAB_SIZE, save_tiny_checkpoint, tiny_config
from tests.traced import traced
from torchtune.config.parse import parse_params
from torchtune.distributed.process_group import planned_world_size
from torchtune.errors import ConfigError
from torchtune.recipes import full_finetune, lora_finetune

CHECKS = {"full_finetune": full_finetune.check, "lora_finetune": lora_finetune.check}
SGD = ("optimizer=torch.optim.SGD", "optimizer.lr=0.1", "lr_scheduler.name=constant", "lr_scheduler.num_warmup_steps=0")
SETTINGS = ("dtype=fp32", "max_steps=2", "epochs=9", "max_seq_len=64", "batch_size=1", "clip_grad_norm=null", *SGD)
# What must not change a number, and so is left out on one device.
WITHOUT_EFFECT = ("scheme", "checkpointing", "compile", "step", "saves")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A dense model and a mixture of experts, half of whose columns are whole blocks of NF4."""
    folder = tmp_path_factory.mktemp("models")
    mixture = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 2, "num_hidden_layers": 3}
    return {
        "dense": save_tiny_checkpoint(folder / "dense", tiny_config(**sizes)),
        "mixture": save_tiny_checkpoint(folder / "mixture", mixture),
    }


def train_traced(recipe, keys):
    """`train`; what is compiled is traced alone."""
    with traced():
        return train(recipe, keys)


def recipe_of(row):
    return "full_finetune" if row["method"] == "full" else "lora_finetune"


def keys_of(row, models, out):
    paths = (f"model_checkpoint={models[row['model']]}", f"dataset={ROWS}", f"output_dir={out}")
    return (*paths, *SETTINGS, *(key for factor, value in row.items() for key in FACTORS[factor][value]))


def alone_keys_of(row, models, out):
    plain = {factor: next(iter(FACTORS[factor])) if factor in WITHOUT_EFFECT else row[factor] for factor in row}
    micro_batches = DATA_RANKS.get(row["scheme"], NUM_RANKS) * int(row["accumulation"].partition(" ")[0])
    keys = keys_of(plain, models, out)
    return (*keys, "data_parallel_replicate=1", f"gradient_accumulation_steps={micro_batches}")


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.usefixtures("one_thread")
def test_runs_of_every_pair_equal_one_device(models, tmp_path, four_ranks):
    """Losses, norms and what is saved, after two steps of SGD."""
    alone = {}
    for number, row in enumerate(covering_rows()):
        recipe = recipe_of(row)
        reference = tuple(key for key in alone_keys_of(row, models, "") if not key.startswith("output_dir"))
        if reference not in alone:
            out = tmp_path / f"alone-{len(alone)}"
            alone[reference] = train(recipe, alone_keys_of(row, models, out))[0], out
        expected, out = alone[reference]
        metrics = four_ranks.run(train_traced, recipe, keys_of(row, models, tmp_path / str(number)), timeout_s=180)[0][
            0
        ]
        # Compiled code sums in another order.
        tolerance = 1e-4 if row["compile"] == "compiled" else 1e-5
        for line, other in zip(expected, metrics, strict=True):
            for key in ("loss", "grad_norm"):
                assert other[key] == pytest.approx(line[key], rel=tolerance), row
        name = "model.safetensors" if recipe == "full_finetune" else "adapter_model.safetensors"
        saved = (load_file(folder / "step_2" / name) for folder in (out, tmp_path / str(number)))
        same_tensors(*saved, atol=tolerance)


@pytest.mark.parametrize("pair", sorted(map(sorted, REFUSED)), ids="-".join)
def test_what_is_refused_is_refused_by_name(models, tmp_path, pair):
    """Before anything is read, with a key."""
    row = {factor: next((v for v in values if v in pair), next(iter(values))) for factor, values in FACTORS.items()}
    if "scheme" in row and row["scheme"] == "replicate" and "replicate" not in pair:
        row["scheme"] = "FSDP"
    recipe = recipe_of(row)
    with planned_world_size(NUM_RANKS), pytest.raises(ConfigError) as error:
        CHECKS[recipe](parse_params(RECIPES[recipe][0], list(keys_of(row, models, tmp_path / "out"))))
    assert all(problem.key for problem in error.value.problems)


def test_the_document_has_the_table_of_these_runs():
    """Made by `python -m tests.parallel.pairs`."""
    written = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert written.strip() == table().strip()


def test_the_runs_have_every_pair():
    """Whatever is not refused stands in one of them."""
    rows = covering_rows()
    for one, other in itertools.combinations(FACTORS, 2):
        for pair in itertools.product(FACTORS[one], FACTORS[other]):
            is_run = any(set(pair) <= set(row.values()) for row in rows)
            assert is_run != (frozenset(pair) in REFUSED), pair
