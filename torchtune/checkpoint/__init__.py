"""Checkpoints: opened, loaded, written, resumed from."""

from torchtune.checkpoint.load import load_model

__all__ = ["load_model"]
