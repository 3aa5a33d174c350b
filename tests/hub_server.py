"""What the stand-ins for the hub's HTTP API share: answering, and running a program against one."""

import hashlib
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class HubHandler(BaseHTTPRequestHandler):
    """Serves the files of `folder`; a subclass says in `answer` what stands at which path."""

    folder: Path
    commit: str

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer(body=True)

    def send_file(self, file, body):
        """A file as `resolve` gives it, with its commit and hash."""
        content = file.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        self.send(content, body, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": self.commit})

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


@contextmanager
def served(handler, folder):
    """The endpoint of a server that answers as `handler` does, from `folder`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (handler,), {"folder": folder}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run_against(endpoint, code, *arguments, home):
    """Run a program that takes this endpoint for the hub, with caches of its own under `home`."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"TORCHTUNE_CACHE": str(home / "torchtune")}
    environment.pop("HF_HUB_OFFLINE", None)
    program = [sys.executable, "-c", code, *arguments]
    return subprocess.run(program, capture_output=True, text=True, timeout=120, env=environment, check=False)
