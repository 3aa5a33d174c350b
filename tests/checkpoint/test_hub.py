"""Hub ids, against a local stand-in for the hub's HTTP API; no internet."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.tiny_checkpoint import save_tiny_checkpoint
from torchtune.checkpoint.hub import resolve
from torchtune.errors import CheckpointError

COMMIT = "1" * 40
OPEN = (
    "import sys; from torchtune.checkpoint.open import open_checkpoint; c = open_checkpoint(sys.argv[1]); print(c.path)"
)


class Hub(BaseHTTPRequestHandler):
    """Serves one repository, `org/tiny`; `org/gated` is gated."""

    folder: Path

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

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
            content = file.read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            return self.send(content, body, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        return self.send(b"", body, 404, {"X-Error-Code": "RepoNotFound"})

    def send(self, content, body, status=200, headers=None):
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        """Quiet."""


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("hub") / "tiny")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle that nobody wants")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (Hub,), {"folder": folder}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run(code, *arguments, endpoint, home):
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    program = [sys.executable, "-c", code, *arguments]
    return subprocess.run(program, capture_output=True, text=True, timeout=120, env=environment, check=False)


def test_a_hub_id_is_opened(endpoint, tmp_path):
    """Downloaded through huggingface_hub: safetensors and texts, no pickle."""
    done = run(OPEN, "org/tiny", endpoint=endpoint, home=tmp_path)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in Path(done.stdout.strip()).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert "pytorch_model.bin" not in names


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
