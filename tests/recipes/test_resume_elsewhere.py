"""A run that is saved on some ranks goes on, on any other number and mesh of them, as if it had never stopped."""

import pytest
from safetensors.torch import load_file

from tests.recipes.conftest import ROWS
from tests.recipes.many_ranks import same_tensors, train
from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_config

WEIGHTS = {"full_finetune": "model.safetensors", "lora_finetune": "adapter_model.safetensors"}
MESHES = {
    "four": (4, 4, ()),
    "four, hybrid": (4, 4, ("data_parallel_replicate=2",)),
    "four, tensor": (4, 2, ("tensor_parallel=2",)),
    "two": (2, 2, ()),
    "two, tensor": (2, 1, ("tensor_parallel=2",)),
    "one": (1, 1, ()),
}
PAIRS = [
    *(("four", "two"), ("four", "one"), ("four, tensor", "one"), ("four, hybrid", "two, tensor")),
    *(("one", "four, tensor"), ("two", "four")),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("source") / "tiny", tiny_config(tie_word_embeddings=False))


def keys_of(source, out, mesh, *more):
    """Twelve rows a step on any number of ranks, with momentum: its state must be there, and Adam would hide a scale."""
    _, data_ranks, keys = MESHES[mesh]
    return (
        *(f"model_checkpoint={source}", f"dataset={ROWS}", f"output_dir={out}", "dtype=fp32", "max_seq_len=64"),
        *("packed=false", "batch_size=1", f"gradient_accumulation_steps={4 // data_ranks}", "max_steps=6", "epochs=9"),
        *("optimizer=torch.optim.SGD", "optimizer.lr=0.1", "optimizer.momentum=0.9", "keep_last=null"),
        *(*keys, *more),
    )


@pytest.mark.timeout(240)
@pytest.mark.parametrize("recipe", WEIGHTS)
def test_losses_and_weights_are_those_of_a_run_that_never_stopped(source, tmp_path, request, recipe):
    def run(name, mesh, *more):
        num_ranks = MESHES[mesh][0]
        keys = keys_of(source, tmp_path / name, mesh, *more)
        if num_ranks == 1:
            return train(recipe, keys)[0]
        pool = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[num_ranks])
        return pool.run(train, recipe, keys)[0][0]

    expected = run("never stopped", "one")
    weights = load_file(tmp_path / "never stopped" / "step_6" / WEIGHTS[recipe])
    for before in dict.fromkeys(before for before, _ in PAIRS):
        run(before, before, "save_every_n_steps=3")
    for before, after in PAIRS:
        resumed = tmp_path / f"{before} then {after}"
        lines = run(resumed.name, after, f"resume_from_checkpoint={tmp_path / before / 'step_3'}")
        assert len(lines) == 3
        for line, other in zip(expected[3:], lines, strict=True):
            assert other["step"] == line["step"]
            for key in ("loss", "grad_norm", "lr"):
                assert other[key] == pytest.approx(line[key], rel=1e-5), (resumed.name, key)
        same_tensors(weights, load_file(resumed / "step_6" / WEIGHTS[recipe]), atol=1e-5)
