"""Data sets by hub id, against a local stand-in for the hub's HTTP API; no internet."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

pytest.importorskip("datasets")

COMMIT = "2" * 40
FILES = {
    "train.jsonl": [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(20)],
    "test.jsonl": [{"prompt": "held out", "completion": "yes"}],
}
OPEN = """
import json, sys
from torchtune.data.files.find import How
from torchtune.data.rows import open_rows
split = sys.argv[2] if len(sys.argv) > 2 else None
print(json.dumps([[row.record, row.source] for row in open_rows(sys.argv[1], how=How(split=split))]))
"""


class Hub(BaseHTTPRequestHandler):
    """Serves the data set `org/chats`."""

    folder: Path

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer(body=True)

    def answer(self, *, body):
        path = unquote(self.path.partition("?")[0])
        files = sorted(file.name for file in self.folder.iterdir())
        if path.startswith("/api/datasets/org/chats"):
            entries = [
                {"type": "file", "path": name, "oid": "0" * 40, "size": (self.folder / name).stat().st_size}
                for name in files
            ]
            if "/tree/" in path:
                return self.send(json.dumps([] if not path.endswith(COMMIT) else entries).encode(), body)
            if "/paths-info/" in path:
                return self.send(json.dumps(entries).encode(), body)
            about = {"id": "org/chats", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files], "tags": []}
            return self.send(json.dumps(about).encode(), body)
        file = self.folder / path.rpartition("/")[2]
        if path.startswith("/datasets/org/chats/resolve/") and file.is_file():
            content = file.read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            return self.send(content, body, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        return self.send(b"", body, 404, {"X-Error-Code": "RepoNotFound" if "resolve" not in path else "EntryNotFound"})

    def send(self, content, body, status=200, headers=None):
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        """Quiet."""


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    for name, rows in FILES.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (Hub,), {"folder": folder}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run(*arguments, endpoint, home):
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"TORCHTUNE_CACHE": str(home / "torchtune")}
    environment.pop("HF_HUB_OFFLINE", None)
    program = [sys.executable, "-c", OPEN, *arguments]
    return subprocess.run(program, capture_output=True, text=True, timeout=120, env=environment, check=False)


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        (None, FILES["train.jsonl"]),
        ("test", FILES["test.jsonl"]),
        ("train[:3]", FILES["train.jsonl"][:3]),
        ("train+test", FILES["train.jsonl"] + FILES["test.jsonl"]),
    ],
)
def test_a_split_is_read(endpoint, tmp_path, split, rows):
    """By its name, and by what `datasets` writes for a part or a sum; places name the data set."""
    done = run("org/chats", *([split] if split else []), endpoint=endpoint, home=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [record for record, _ in found] == rows
    assert all(source.startswith("org/chats") for _, source in found)


@pytest.mark.parametrize(("arguments", "said"), [(("org/chats", "tset"), "tset"), (("org/nothing",), "org/nothing")])
def test_what_the_hub_does_not_have_is_told(endpoint, tmp_path, arguments, said):
    """By data set or split."""
    done = run(*arguments, endpoint=endpoint, home=tmp_path)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "DataError" in last
    assert said in last
