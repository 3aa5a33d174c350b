"""Checkpoints in and out: whole or absent."""
