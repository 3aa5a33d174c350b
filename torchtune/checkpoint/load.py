"""One call from a path to a model that computes."""

from __future__ import annotations

from pathlib import Path

import torch

from torchtune.checkpoint.open import open_checkpoint
from torchtune.models.build import build_model
from torchtune.modules.decoder import CausalLM
from torchtune.modules.dtypes import DTYPES


def load_model(
    path: str | Path, *, dtype: torch.dtype | str | None = None, device: torch.device | str = "cpu"
) -> CausalLM:
    """The model of a checkpoint, with its weights.

    `model(input_ids)` gives logits ([B, S] -> [B, S, V], or [T] -> [T, V]); documents or positions and a cache
    are optional arguments of `CausalLM.forward`. `model.state_dict()` has the checkpoint's own names.

    Args:
        path: a Hugging Face-layout folder, a GGUF file or a hub id.
        dtype: of the parameters in memory, as a torch dtype or its name (`bf16`, `bfloat16`); by default the checkpoint's.
        device: where they go.
    Raises:
        CheckpointError: a file is missing, cut or does not fit its config; names file and tensor.
        UnsupportedError: an architecture that is not known.
    """
    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        model = build_model(checkpoint.config)
    checkpoint.load_into(model, device=device, param_dtype=_dtype(dtype) or checkpoint.held_dtype)
    return model.eval()


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if not isinstance(dtype, str):
        return dtype
    found = DTYPES.get(dtype) or getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype: '{dtype}' is no dtype; {', '.join(DTYPES)} are, and torch's own names")
    return found
