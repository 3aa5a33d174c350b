"""The founding text's door: its names, from their homes."""
