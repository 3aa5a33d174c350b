"""What README and docs tell people to type, runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_checkpoint import save_tiny_checkpoint

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ROWS = ROOT / "tests" / "cases" / "common_rows24.jsonl"
# What stands in the documents for the reader's own.
MODELS, DATA = ("DIR", "SmolLM2-135M-Instruct"), ("FILE.jsonl", "chats.jsonl")


def commands():
    for document in DOCUMENTS:
        for block in re.findall(r"```bash\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.splitlines():
                if line.startswith(("tune ", "make ", "pip ")):
                    yield document.name, line


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a model and data under the documents' names."""
    folder = tmp_path_factory.mktemp("docs")
    for name in MODELS:
        save_tiny_checkpoint(folder / name)
    for name in DATA:
        (folder / name).write_bytes(ROWS.read_bytes())
    return folder


@pytest.mark.parametrize(("document", "line"), [c for c in commands() if c[1].startswith("tune ")])
def test_a_documented_command_runs(workplace, document, line):
    """In the order of the documents, in one folder, on a tiny model."""
    line = line.replace("...", "model_checkpoint=DIR dataset=FILE.jsonl").replace("step_N", "step_1")
    words = shlex.split(line)
    trains = words[1] == "run" and not {"export", "quantize", "evaluate", "generate", "--help"} & set(words)
    more = ["max_steps=1"] if trains else []
    outputs = [word.partition("=")[2] for word in words if word.startswith("output_dir=")]
    is_gone_on_from = any(f"{output}/step_N" in other for output in outputs for _, other in commands())
    more += ["save_last=false"] if trains and not is_gone_on_from else []
    done = subprocess.run(
        [sys.executable, "-m", "torchtune.cli.tune", *words[1:], *more],
        cwd=workplace,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_documented_make_targets_exist():
    """`make quickstart` and `make test`; they set up an environment, so CI runs them and not this test."""
    makefile = (ROOT / "Makefile").read_text()
    targets = {line.split()[1] for _, line in commands() if line.startswith("make ")}
    assert targets == {"quickstart", "test"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_every_key_of_the_defaults_table_exists():
    """docs/defaults.md names keys as they are."""
    from torchtune.config.keys import all_keys
    from torchtune.recipes.lora_finetune import LoRAFinetuneParams

    known = {".".join(path) for path, _ in all_keys(LoRAFinetuneParams)} | {"optimizer.lr", "optimizer.weight_decay"}
    rows = [line for line in (ROOT / "docs" / "defaults.md").read_text().splitlines() if line.startswith("| `")]
    named = {key for row in rows for key in re.findall(r"`([^`]+)`", row.split("|")[1])}
    assert named
    assert named <= known
