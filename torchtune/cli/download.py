"""`tune download REPO_ID`: fetch a checkpoint from the hub."""

from __future__ import annotations

import os
from pathlib import Path

from torchtune.cli.tune import parser


def run(argv: list[str]) -> int:
    """Download a repository's checkpoint and say where it lies."""
    arguments = parser("download", "Fetch a checkpoint from the Hugging Face hub.")
    arguments.add_argument("repo_id", help="ORG/NAME, or ORG/NAME@REVISION")
    arguments.add_argument("--output-dir", type=Path, help="a folder; by default huggingface_hub's cache")
    arguments.add_argument(
        "--hf-token", default=os.environ.get("HF_TOKEN"), help="by default the environment's HF_TOKEN"
    )
    arguments.add_argument("--ignore-patterns", action="append", help="files to leave out, e.g. 'original/*'")
    options = arguments.parse_args(argv)
    from torchtune.checkpoint.hub import download

    repo_id, _, revision = options.repo_id.partition("@")
    folder = download(
        repo_id,
        revision=revision or None,
        local_dir=options.output_dir,
        token=options.hf_token,
        ignore_patterns=options.ignore_patterns,
    )
    print(folder)
    print(f"next: tune run full_finetune model_checkpoint={folder} dataset=FILE.jsonl")
    return 0
