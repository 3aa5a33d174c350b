"""Programs of torch.export: any rows of any length, the logits of transformers, and nothing of ours in them."""

import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.checkpoint.test_gguf_architectures import CASES
from tests.models.families import FAMILIES
from tests.models.oracle import assert_close, save_random
from tests.tiny_checkpoint import save_tiny_checkpoint
from torchtune.checkpoint.load import load_model
from torchtune.checkpoint.open import open_checkpoint
from torchtune.checkpoint.program import trace_program, write_program
from torchtune.errors import UnsupportedError
from torchtune.models.build import build_model

# Beside FAMILIES, those that have layers, norms, projections or routers of their own.
MORE = ("cohere2", "glm4moe", "gptneox", "granitemoe", "olmo2", "phi2", "qwen2moe", "stablelm", "starcoder2")
CONFIGS = {name: transformers.AutoConfig.for_model(**options) for name, options in FAMILIES.items()}
CONFIGS |= {name: CASES[name].config(**CASES[name].options) for name in MORE}
# Of one token, and beyond windows, chunks and the contexts of pre-training; transformers keeps the angles of long ones.
SHAPES = ((1, 1), (4, 1), (3, 5), (1, 21), (2, 30))


def write(folder, path, dtype=torch.float32):
    """The program of a folder."""
    checkpoint = open_checkpoint(folder)
    with torch.device("meta"):
        read = checkpoint.reader(build_model(checkpoint.config))
    write_program(trace_program(checkpoint.config, dtype), path, lambda name, held: read(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_program_gives_the_logits_of_transformers(tmp_path, name):
    """In float32 within 1e-5 of the largest, whatever its rows; what it was traced with is in none of them."""
    theirs = save_random(tmp_path / "model", CONFIGS[name])
    write(tmp_path / "model", tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for shape in SHAPES:
        ids = torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            assert_close(program(ids), theirs(ids).logits, 1e-5, f"logits of {shape}")


@pytest.mark.parametrize("name", ["llama", "mixtral with its router's loss"])
def test_half_precision_computes_what_our_model_does(tmp_path, name):
    """In bfloat16, experts by torch's kernel: within its rounding."""
    save_random(tmp_path / "model", CONFIGS[name])
    write(tmp_path / "model", tmp_path / "model.pt2", torch.bfloat16)
    program, ours = (
        torch.export.load(tmp_path / "model.pt2").module(),
        load_model(tmp_path / "model", dtype=torch.bfloat16),
    )
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = program(ids)
        assert found.dtype == torch.bfloat16
        assert_close(found.float(), ours(ids).float(), 0.05, "logits")


def test_torch_alone_runs_it(tmp_path):
    """In a process that can't import this package."""
    folder = save_tiny_checkpoint(tmp_path / "model")
    write(folder, tmp_path / "model.pt2")
    script = (
        "import sys; sys.modules['torchtune'] = None\n"
        "import torch\nfrom safetensors.torch import save_file\n"
        "program = torch.export.load('model.pt2').module()\n"
        "with torch.no_grad(): save_file({'logits': program(torch.arange(14).reshape(2, 7))}, 'logits.safetensors')\n"
    )
    subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, check=True, timeout=300)
    with torch.no_grad():
        expected = load_model(folder)(torch.arange(14).reshape(2, 7))
    torch.testing.assert_close(load_file(tmp_path / "logits.safetensors")["logits"], expected)


def test_the_model_that_was_traced_goes_on(tmp_path):
    """Nothing of the tracing stays in a model that a user exports himself."""
    model = load_model(save_tiny_checkpoint(tmp_path / "model"))
    ids = torch.arange(6).reshape(2, 3)
    with torch.no_grad():
        before = model(ids)
        program = torch.export.export(model, (ids,))
        assert torch.equal(model(ids), before)
        torch.testing.assert_close(program.module()(ids), before)


def test_more_tokens_than_there_are_positions_are_refused(tmp_path):
    """GPT-2's learnt ones: the program says how many it takes."""
    save_random(tmp_path / "model", CONFIGS["gpt2"])
    write(tmp_path / "model", tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    with pytest.raises((AssertionError, RuntimeError), match="64"):
        program(torch.zeros(1, 65, dtype=torch.int64))


def test_what_can_not_be_traced_is_refused_by_its_name(monkeypatch):
    """With the reason that torch gives."""

    def depends_on_values(*_, **__):
        raise RuntimeError("Could not guard on data-dependent expression\nand so on")

    monkeypatch.setattr("torch.export.export", depends_on_values)
    with pytest.raises(UnsupportedError, match="model_type 'qwen3' can't be traced .* data-dependent expression;"):
        trace_program(FAMILIES["qwen3"], torch.float32)
