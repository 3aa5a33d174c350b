"""Quantisation, as transforms of a built model."""
