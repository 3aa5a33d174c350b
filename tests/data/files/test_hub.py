"""Data sets by hub id, against a local stand-in for the hub's HTTP API; no internet."""

import json
from urllib.parse import unquote

import pytest

from tests.hub_server import HubHandler, run_against, served

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


class Hub(HubHandler):
    """Serves the data set `org/chats`."""

    commit = COMMIT

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
            return self.send_file(file, body)
        return self.send(b"", body, 404, {"X-Error-Code": "RepoNotFound" if "resolve" not in path else "EntryNotFound"})


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    for name, rows in FILES.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with served(Hub, folder) as url:
        yield url


def run(*arguments, endpoint, home):
    return run_against(endpoint, OPEN, *arguments, home=home)


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
