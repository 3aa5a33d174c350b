"""Parallelism, applied to a built model from outside it."""
