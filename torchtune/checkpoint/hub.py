"""Checkpoints by hub id, through huggingface_hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from torchtune.errors import CheckpointError, nearest

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
# What a checkpoint is made of; other forms of the same weights are left where they are.
WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.md", "LICENSE*"]
PICKLES = ["*.bin"]
UNWANTED = ["original/*", "onnx/*", "*/*.safetensors", "runs/*"]


def resolve(source: str, *, weights: bool = True) -> Path:
    """Where a checkpoint lies: a path as it is, a hub id downloaded into huggingface_hub's cache.

    Args:
        weights: false downloads config, tokenizer and template alone.
    Raises:
        CheckpointError: no such path, and no hub id either; or the hub refuses.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    looks_like_path = source.startswith((".", "/", "~")) or source.endswith(".gguf") or not HUB_ID.fullmatch(source)
    if looks_like_path or (path.parent.is_dir() and path.parent != Path()):
        raise CheckpointError(f"there is no such folder or file{_near(path)}", path=source)
    repo_id, _, revision = source.partition("@")
    return download(repo_id, revision=revision or None, weights=weights)


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    local_dir: Path | None = None,
    token: str | None = None,
    ignore_patterns: Sequence[str] | None = None,
    weights: bool = True,
) -> Path:
    """A snapshot of a model repository.

    Args:
        repo_id: `org/name`.
        local_dir: a folder to put it in, in place of the cache.
        token: the hub's token; None means that of the environment.
        weights: false leaves the weights out.
        ignore_patterns: files to leave out; None leaves out what a checkpoint does not need.
    Raises:
        CheckpointError: the hub can't be reached, has no such repository, or wants a token.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    allowed = WANTED if ignore_patterns is None else None
    ignored = UNWANTED if ignore_patterns is None else list(ignore_patterns)
    ignored = ignored if weights else [*ignored, "*.safetensors"]

    def fetch(patterns: list[str] | None) -> Path:
        found = snapshot_download(
            repo_id,
            revision=revision,
            local_dir=local_dir,
            token=token,
            allow_patterns=patterns,
            ignore_patterns=ignored,
        )
        return Path(str(found))

    try:
        folder = fetch(allowed)
        if allowed is not None and weights and not any(folder.glob("*.safetensors")):
            fetch(PICKLES)  # an old repository: its weights lie in nothing else
    except GatedRepoError as error:
        remedy = "ask for access on its page and log in with `hf auth login`, or pass a token"
        raise CheckpointError(f"is gated: {remedy}", path=repo_id) from error
    except RepositoryNotFoundError as error:
        remedy = "check the name, or log in if it is private; a local folder must exist"
        raise CheckpointError(f"is no repository of the hub: {remedy}", path=repo_id) from error
    except LocalEntryNotFoundError as error:
        remedy = "connect, or name a local folder"
        raise CheckpointError(f"is not in the cache and the hub can't be reached: {remedy}", path=repo_id) from error
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"can't be downloaded: {error}", path=repo_id) from error
    return folder


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; {path.parent} does not exist either"
    match = nearest(path.name, [entry.name for entry in path.parent.iterdir()])
    return f"; did you mean '{path.parent / match}'?" if match else ""
