"""The JSON schema of a params class, for editors and other tools."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue


class _WithShorthands(GenerateJsonSchema):
    def dataclass_schema(self, schema: Any) -> JsonSchemaValue:
        whole = super().dataclass_schema(schema)
        names = [getattr(schema["cls"], name, None) for name in ("shorthand", "list_shorthand")]
        shorts = [whole["properties"][name] for name in names if name]
        return {"anyOf": [*shorts, whole]} if shorts else whole


def json_schema(cls: type) -> dict[str, Any]:
    """What a YAML file for `cls` may hold, with descriptions, defaults and bounds."""
    return TypeAdapter(cls).json_schema(schema_generator=_WithShorthands)
