"""Forms from the JSON schemas of payloads: a new kind has one without a line written for it."""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from app.jobs.kind import Kind, file_fields
from app.web.templating import label

Widget = Literal["file", "line", "text", "number", "choice", "switch", "json"]
# Longer texts get a field of several lines.
LONGEST_LINE = 3000


@dataclass(frozen=True)
class Field:
    """One field of a form. `one_of`: exactly one of the fields with this mark is sent."""

    name: str
    label: str
    description: str
    widget: Widget
    required: bool
    one_of: bool
    default: Any
    schema: dict[str, Any]


@cache
def fields(kind: Kind) -> list[Field]:
    """The form for this kind's payload."""
    schema = kind.payload.model_json_schema()
    alternatives = {name for rule in schema.get("oneOf", ()) for name in rule.get("required", ())}
    files = file_fields(kind.payload)
    found = []
    for name, described in schema["properties"].items():
        inner = _inner(described, schema.get("$defs", {}))
        found.append(
            Field(
                name=name,
                label=label(name),
                description=described.get("description", ""),
                widget="file" if name in files else _widget(inner),
                required=name in schema.get("required", ()),
                one_of=name in alternatives,
                default=described.get("default"),
                schema=inner,
            )
        )
    return found


def _inner(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """What a value looks like if there is one: without `or null`, and without a detour over a definition."""
    if "$ref" in schema:
        return _inner(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    values = [option for option in schema.get("anyOf", ()) if option.get("type") != "null"]
    return _inner(values[0], definitions) if len(values) == 1 else schema


def _widget(schema: dict[str, Any]) -> Widget:
    if "enum" in schema:
        return "choice"
    match schema.get("type"):
        case "integer" | "number":
            return "number"
        case "boolean":
            return "switch"
        case "string":
            return "line" if schema.get("maxLength", LONGEST_LINE + 1) <= LONGEST_LINE or "format" in schema else "text"
    return "json"
