"""YAML, key=value and dataclasses to validated params."""
