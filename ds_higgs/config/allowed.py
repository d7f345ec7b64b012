"""What each key of the configuration may hold, in words, from its JSON schema."""

from collections.abc import Iterator
from functools import cache
from typing import Any

from ds_higgs.config.sections import Config
from ds_higgs.config.types import MAX_COUNT, MAX_SECONDS, MAX_SEED

_NO_BOUNDS = (MAX_COUNT, MAX_SEED, MAX_SECONDS)  # larger than anybody means


@cache
def allowed_values() -> dict[str, str]:
    """ "section.key" to what it takes: "auto | none | a whole number from 1", "a number above 0"."""
    schema = Config.model_json_schema()
    found: dict[str, str] = {}
    for section, field in Config.model_fields.items():
        properties = schema["$defs"][field.annotation.__name__]["properties"]  # type: ignore[union-attr]
        found |= {
            f"{section}.{key}": " | ".join(dict.fromkeys(_describe(value, schema["$defs"])))
            for key, value in properties.items()
        }
    return found


def _describe(schema: dict[str, Any], sections: dict[str, Any]) -> Iterator[str]:
    """One text for each kind of value; null, which leaves a key unset, is none."""
    if "anyOf" in schema:
        for choice in schema["anyOf"]:
            yield from _describe(choice, sections)
    elif "$ref" in schema:
        yield f"{{{', '.join(sections[schema['$ref'].rpartition('/')[2]]['properties'])}}}"
    elif "enum" in schema or "const" in schema:
        yield from map(str, schema.get("enum", [schema.get("const")]))
    elif schema.get("type") == "array":
        items = schema.get("items") or {"anyOf": schema["prefixItems"]}
        yield f"a list of: {' | '.join(dict.fromkeys(_describe(items, sections)))}"
    elif schema.get("type") in ("integer", "number"):
        yield _describe_number(schema)
    elif schema.get("type") != "null":
        yield {"boolean": "true | false", "object": "a mapping"}.get(schema.get("type", ""), _text(schema))


def _describe_number(schema: dict[str, Any]) -> str:
    words = ["a whole number" if schema["type"] == "integer" else "a number"]
    if "exclusiveMinimum" in schema:
        words.append(f"above {schema['exclusiveMinimum']:g}")
    if "minimum" in schema:
        words.append(f"from {schema['minimum']:g}")
    if "exclusiveMaximum" in schema:
        words.append(f"below {schema['exclusiveMaximum']:g}")
    if schema.get("maximum") is not None and schema["maximum"] not in _NO_BOUNDS:
        words.append(f"to {schema['maximum']:g}")
    return " ".join(words)


def _text(schema: dict[str, Any]) -> str:
    return "a path" if schema.get("format") == "path" else "a text"
