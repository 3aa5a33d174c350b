"""Hub ids, against a local stand-in for the hub's HTTP API; no internet."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.hub_server import HubHandler, run_against, served
from tests.tiny_checkpoint import save_tiny_checkpoint
from torchtune.checkpoint.hub import resolve
from torchtune.errors import CheckpointError

COMMIT = "1" * 40
OPEN = (
    "import sys; from torchtune.checkpoint.open import open_checkpoint; c = open_checkpoint(sys.argv[1]); print(c.path)"
)


class Hub(HubHandler):
    """Serves one repository, `org/tiny`; `org/gated` is gated."""

    commit = COMMIT

    def answer(self, *, body):
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/tiny"):
            files = [
                {"rfilename": str(file.relative_to(self.folder))} for file in self.folder.rglob("*") if file.is_file()
            ]
            if "/tree/" in path:
                content = [{"type": "file", "path": f["rfilename"], "size": 1, "oid": "0" * 40} for f in files]
                return self.send(json.dumps(content).encode(), body)
            return self.send(json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": files}).encode(), body)
        if "org/gated" in path:
            return self.send(b"", body, 403, {"X-Error-Code": "GatedRepo"})
        name = path.partition("/resolve/")[2].partition("/")[2]
        file = self.folder / name
        if path.startswith("/org/tiny/") and name and file.is_file():
            return self.send_file(file, body)
        return self.send(b"", body, 404, {"X-Error-Code": "RepoNotFound"})


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("hub") / "tiny")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle that nobody wants")
    with served(Hub, folder) as url:
        yield url


def run(code, *arguments, endpoint, home):
    return run_against(endpoint, code, *arguments, home=home)


def test_a_hub_id_is_opened(endpoint, tmp_path):
    """Downloaded through huggingface_hub: safetensors and texts, no pickle."""
    done = run(OPEN, "org/tiny", endpoint=endpoint, home=tmp_path)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in Path(done.stdout.strip()).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert "pytorch_model.bin" not in names


def test_an_old_repository_has_its_pickles_downloaded(tmp_path):
    """Where there are no safetensors, the weights are in .bin files, and those open."""
    folder = save_tiny_checkpoint(tmp_path / "tiny")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with served(Hub, folder) as url:
        done = run(OPEN, "org/tiny", endpoint=url, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "pytorch_model.bin").exists()


def test_tune_download(endpoint, tmp_path):
    """Into a folder of one's choice, which is a checkpoint then."""
    code = "from torchtune.cli.tune import main; main()"
    done = run(code, "download", "org/tiny", "--output-dir", str(tmp_path / "model"), endpoint=endpoint, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(("repo", "said"), [("org/gated", "is gated"), ("org/absent", "is no repository of the hub")])
def test_refusals_say_what_to_do(endpoint, tmp_path, repo, said):
    """Gated and absent repositories, without a traceback of the library's."""
    code = "from torchtune.cli.tune import main; main()"
    done = run(code, "download", repo, endpoint=endpoint, home=tmp_path)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unreachable_hub_is_told(tmp_path):
    """Nothing listens there."""
    code = "from torchtune.cli.tune import main; main()"
    done = run(code, "download", "org/tiny", endpoint="http://127.0.0.1:9", home=tmp_path)
    assert done.returncode == 1
    assert "org/tiny" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("path", ["./absent", "/absent/model", "absent.gguf", "absent"])
def test_a_path_never_goes_to_the_network(path):
    """What looks like a path and is not there says so."""
    with pytest.raises(CheckpointError, match="there is no such folder or file"):
        resolve(path)
