"""The keywords of JSON Schema that docs/manifest.schema.json uses; other keywords raise."""

from __future__ import annotations

import re
from typing import Any

_TYPES = {"object": dict, "array": list, "string": str, "null": type(None)}


def faults(schema: dict[str, Any], value: Any, root: dict[str, Any] | None = None, place: str = "$") -> list[str]:
    """Return the paths at which a value violates a schema."""
    root = schema if root is None else root
    found: list[str] = []
    for keyword, rule in schema.items():
        if not _KEYWORDS[keyword](schema, rule, value, root):
            found.append(f"{place}: {keyword} {rule!r}")
        elif keyword == "$ref":
            found += faults(root["$defs"][rule.removeprefix("#/$defs/")], value, root, place)
        elif keyword == "properties":
            found += [
                f for key in rule.keys() & value.keys() for f in faults(rule[key], value[key], root, f"{place}.{key}")
            ]
        elif keyword == "additionalProperties" and rule is not False:
            rest = value.keys() - schema.get("properties", {}).keys()
            found += [f for key in rest for f in faults(rule, value[key], root, f"{place}.{key}")]
        elif keyword == "items":
            found += [f for i, item in enumerate(value) for f in faults(rule, item, root, f"{place}[{i}]")]
        if found and keyword == "type":
            break  # the other keywords would fail on a value of the wrong type
    return found


def _is(name: str, value: Any) -> bool:
    return type(value) is int if name == "integer" else isinstance(value, _TYPES[name])


_KEYWORDS = {
    "$schema": lambda s, rule, v, root: rule == "https://json-schema.org/draft/2020-12/schema",
    "$defs": lambda s, rule, v, root: True,
    "$ref": lambda s, rule, v, root: rule.startswith("#/$defs/"),
    "title": lambda s, rule, v, root: True,
    "description": lambda s, rule, v, root: True,
    "type": lambda s, rule, v, root: _is(rule, v),
    "const": lambda s, rule, v, root: type(v) is type(rule) and v == rule,
    "enum": lambda s, rule, v, root: v in rule,
    "minimum": lambda s, rule, v, root: v >= rule,
    "maximum": lambda s, rule, v, root: v <= rule,
    "minLength": lambda s, rule, v, root: len(v) >= rule,
    "minItems": lambda s, rule, v, root: len(v) >= rule,
    "maxItems": lambda s, rule, v, root: len(v) <= rule,
    "pattern": lambda s, rule, v, root: re.search(rule, v) is not None,
    "required": lambda s, rule, v, root: v.keys() >= set(rule),
    "properties": lambda s, rule, v, root: True,
    "additionalProperties": lambda s, rule, v, root: rule is not False or v.keys() <= s["properties"].keys(),
    "items": lambda s, rule, v, root: True,
    "anyOf": lambda s, rule, v, root: any(not faults(one, v, root) for one in rule),
}
