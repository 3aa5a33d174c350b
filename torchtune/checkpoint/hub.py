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
# What only resuming needs; it has the paths of a run.
NOT_PUBLISHED = ["recipe_state/*", "manifest.json", "merged/*", "*.writing"]
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


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload",
    token: str | None = None,
) -> str:
    """Put a model's or an adapter's folder into a repository, in one commit; returns its address.

    Args:
        private: where the repository is new.
        revision: a branch; made where it is not there.
        token: the hub's token; None means that of the environment.
    Raises:
        CheckpointError: the folder holds no model, or the hub refuses; says what to do.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")) and not any(
        folder.glob("*.gguf")
    ):
        raise CheckpointError(
            "holds no model: neither config.json nor adapter_config.json nor a GGUF file; of a run, name a step's folder",
            path=folder,
        )
    api = HfApi(token=token)
    try:
        address = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            ignore_patterns=NOT_PUBLISHED,
        )
    except HFValidationError as error:
        raise CheckpointError(f"is no name of a repository: {error}", path=repo_id) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        remedy = "; log in with `hf auth login`, or pass a token that may write" if status in (401, 403) else ""
        raise CheckpointError(f"the hub refuses: {error}{remedy}", path=repo_id) from error
    except OSError as error:
        raise CheckpointError(f"can't be uploaded: {error}", path=repo_id) from error
    return str(address)


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; {path.parent} does not exist either"
    match = nearest(path.name, [entry.name for entry in path.parent.iterdir()])
    return f"; did you mean '{path.parent / match}'?" if match else ""
