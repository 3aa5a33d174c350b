"""Data as it will be trained on, to be looked at: numbers, tokens in a terminal, in a page, or as JSON."""
