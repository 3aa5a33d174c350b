"""Held-out loss and evaluation harnesses."""
