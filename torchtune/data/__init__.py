"""Rows to messages to tokens and the mask of trained ones."""
