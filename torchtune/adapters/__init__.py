"""Low-rank adapters, as transforms of a built model."""
