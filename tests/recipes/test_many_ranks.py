"""One device and many give the same: losses, norms, rows and checkpoints, in every scheme."""

import pytest
from safetensors.torch import load_file

from tests.recipes.conftest import ROWS
from tests.recipes.many_ranks import rows_of_steps, same_tensors, train
from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_config

SGD = ("optimizer=torch.optim.SGD", "optimizer.lr=0.1", "lr_scheduler.name=constant", "lr_scheduler.num_warmup_steps=0")
SCHEMES = {
    2: {
        "replicate": ("data_parallel_replicate=2",),
        "fsdp": (),
        "fsdp-kept": ("fsdp_reshard_after_forward=false", "fsdp_sum_once=true"),
        "tensor": ("tensor_parallel=2",),
        "context": ("context_parallel=2",),
    },
    4: {
        "fsdp": (),
        "hsdp": ("data_parallel_replicate=2", "data_parallel_shard=2"),
        "tensor-fsdp": ("tensor_parallel=2",),
        "context-fsdp": ("context_parallel=2",),
        "tensor-context": ("tensor_parallel=2", "context_parallel=2"),
    },
}
SHARING = {"tensor": 2, "context": 2, "tensor-fsdp": 2, "context-fsdp": 2, "tensor-context": 4}
WEIGHTS = {"full_finetune": "model.safetensors", "lora_finetune": "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny Llama whose head is its own."""
    config = tiny_config(tie_word_embeddings=False, num_key_value_heads=2)
    return save_tiny_checkpoint(tmp_path_factory.mktemp("source") / "tiny", config)


def keys_of(source, out, *more, data_ranks=1):
    batch = (
        "max_steps=10",
        "epochs=20",
        "max_seq_len=64",
        "batch_size=1",
        f"gradient_accumulation_steps={4 // data_ranks}",
    )
    paths = (f"model_checkpoint={source}", f"dataset={ROWS}", f"output_dir={out}", "dtype=fp32")
    return (*paths, *batch, *SGD, "eval_fraction=0.2", *more)


def schemes_on_ranks(recipe, runs):
    """All runs, one after the other, inside one group of ranks."""
    return {name: train(recipe, keys) for name, keys in runs.items()}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("packed", ["true", "false"])
@pytest.mark.parametrize("recipe", WEIGHTS)
@pytest.mark.parametrize("num_ranks", SCHEMES)
def test_every_scheme_equals_one_device(source, tmp_path, request, num_ranks, recipe, packed):
    """Ten steps of SGD, which a wrong gradient scale changes: within 1e-5 in fp32."""
    pool = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[num_ranks])
    alone = train(recipe, keys_of(source, tmp_path / "alone", f"packed={packed}"))
    runs = {
        name: keys_of(source, tmp_path / name, f"packed={packed}", *keys, data_ranks=num_ranks // SHARING.get(name, 1))
        for name, keys in SCHEMES[num_ranks].items()
    }
    answers = pool.run(schemes_on_ranks, recipe, runs, timeout_s=240)
    expected = load_file(tmp_path / "alone" / "step_10" / WEIGHTS[recipe])
    for name in runs:
        results = [answer[name] for answer in answers]
        for line, other in zip(alone[0], results[0][0], strict=True):
            assert (line["tokens"], line["trained_tokens"]) == (other["tokens"], other["trained_tokens"])
            for key in ("loss", "grad_norm", "eval_loss"):
                assert other.get(key) == (pytest.approx(line[key], rel=1e-5) if key in line else None), name
        assert rows_of_steps(results) == rows_of_steps([alone]), name
        same_tensors(expected, load_file(tmp_path / name / "step_10" / WEIGHTS[recipe]), atol=1e-5)
