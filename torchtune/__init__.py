"""Recipes for post-training language models in native PyTorch, and the building blocks under them."""

__version__ = "0.7.0"
