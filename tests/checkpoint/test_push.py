"""tune push against a stand-in for the hub's HTTP API: what arrives, in one commit, and what is refused."""

import base64
import json

import pytest

from tests.hub_server import HubHandler, run_against, served
from tests.tiny_checkpoint import save_tiny_checkpoint

PUSH = "import sys; from torchtune.cli.tune import main; main(['push', *sys.argv[1:]])"


class Hub(HubHandler):
    """Takes commits, and keeps what they hold in `folder`: files, and the requests in order."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with (self.folder / "requests.txt").open("a") as file:
            file.write(f"{self.path} {self.headers.get('Authorization')}\n")
        if self.headers.get("Authorization") != "Bearer secret":
            return self.send(b'{"error": "no token"}', True, 401)
        if self.path == "/api/repos/create":
            return self._json({"url": f"http://{self.headers['Host']}/me/mine", "id": "me/mine"})
        if "/preupload/" in self.path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            host = f"http://{self.headers['Host']}"
            objects = [
                {**each, "actions": {"upload": {"href": f"{host}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                if line["key"] == "file":
                    self._keep(line["value"]["path"], base64.b64decode(line["value"]["content"]))
                elif line["key"] == "lfsFile":
                    self._keep(line["value"]["path"], (self.folder / line["value"]["oid"]).read_bytes())
            commit = {
                "commitUrl": f"http://{self.headers['Host']}/me/mine/commit/{'1' * 40}",
                "commitOid": "1" * 40,
                "pullRequestUrl": None,
            }
            return self._json(commit | {"success": True})
        return self._json({})

    def do_PUT(self):
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        (self.folder / self.path.rpartition("/")[2]).write_bytes(content)
        self.send(b"", True)

    def answer(self, body):
        self._json({"id": "me/mine", "siblings": [], "sha": "0" * 40})

    def _keep(self, name, content):
        target = self.folder / "repo" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    def _json(self, value):
        self.send(json.dumps(value).encode(), True)


@pytest.fixture
def checkpoint(tmp_path):
    """A model folder with what only resuming needs."""
    folder = save_tiny_checkpoint(tmp_path / "step_3")
    (folder / "recipe_state").mkdir()
    (folder / "recipe_state" / "state.json").write_text("{}")
    (folder / "manifest.json").write_text("{}")
    return folder


def pushed(tmp_path, *arguments):
    hub = tmp_path / "hub"
    hub.mkdir()
    with served(Hub, hub) as endpoint:
        return run_against(endpoint, PUSH, *map(str, arguments), home=tmp_path / "home"), hub


def test_a_folder_arrives_whole_without_what_resuming_needs(checkpoint, tmp_path):
    done, hub = pushed(tmp_path, checkpoint, "me/mine", "--private", "--hf-token", "secret")
    assert done.returncode == 0, done.stderr
    sent = {
        file.relative_to(hub / "repo").as_posix(): file.read_bytes()
        for file in (hub / "repo").rglob("*")
        if file.is_file()
    }
    expected = {
        file.relative_to(checkpoint).as_posix(): file.read_bytes()
        for file in checkpoint.rglob("*")
        if file.is_file() and "recipe_state" not in file.parts and file.name != "manifest.json"
    }
    assert sent == expected
    commits = [line for line in (hub / "requests.txt").read_text().splitlines() if "/commit/" in line]
    assert len(commits) == 1


def test_what_is_no_model_and_who_may_not_write_is_refused(checkpoint, tmp_path):
    done, hub = pushed(tmp_path, tmp_path, "me/mine", "--hf-token", "secret")
    assert done.returncode == 1
    assert "holds no model" in done.stderr
    assert not (hub / "requests.txt").exists()
    (tmp_path / "second").mkdir()
    done, hub = pushed(tmp_path / "second", checkpoint, "me/mine", "--hf-token", "wrong")
    assert done.returncode == 1
    assert "pass a token that may write" in done.stderr
    assert not (hub / "repo").exists()
