"""YAML, `key=value` and dataclasses to validated params.

Params: `parse.parse_params`, `strict.STRICT`, `serialize.to_yaml`, `schema.json_schema`.
Components: `component.Component`, `component.instantiate`.
"""
