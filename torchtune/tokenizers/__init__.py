"""Thin faces over tokenizer libraries."""
