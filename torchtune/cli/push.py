"""`tune push FOLDER REPO_ID`: put a model or adapter on the hub."""

from __future__ import annotations

import os
from pathlib import Path

from torchtune.cli.tune import parser


def run(argv: list[str]) -> int:
    """Upload a folder's model, without what only resuming needs, and say where it is."""
    arguments = parser("push", "Put a model or adapter on the Hugging Face hub, whole: it is there or it is not.")
    arguments.add_argument("folder", type=Path, help="an exported folder, a checkpoint of a run, an adapter")
    arguments.add_argument("repo_id", help="ORG/NAME")
    arguments.add_argument("--private", action="store_true", help="where the repository is new")
    arguments.add_argument("--revision", help="a branch; made where it is not there")
    arguments.add_argument("--message", default="Upload from torchtune", help="of the commit")
    arguments.add_argument(
        "--hf-token", default=os.environ.get("HF_TOKEN"), help="by default the environment's HF_TOKEN"
    )
    options = arguments.parse_args(argv)
    from torchtune.checkpoint.hub import push

    print(
        push(
            options.folder,
            options.repo_id,
            private=options.private,
            revision=options.revision,
            message=options.message,
            token=options.hf_token,
        )
    )
    return 0
