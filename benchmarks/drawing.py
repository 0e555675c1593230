"""Draws documents from the JSON Schema: whatever the catalogue holds, plug-ins and new files included, gets drawn."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from archspec.json_schema import spec_schema

Json = dict[str, Any]

NUMBERS = (0.5, 1.0, 2.0, 0.1, 3.0, 0.0, -1.0, 1.5)
SMALL = {"num_heads": (1, 2), "key_dim": (4, 2), "value_dim": (4, 3), "prefix": (0, 0, 2), "conv": (0, 2, 3)}
"""Sizes that keep a test short, by key."""
NAMES = {"from": ("input", "input", "key", "query", "value"), "of": ("value",)}


class Drawer:
    """Draws values that satisfy a definition of the JSON Schema.

    Args:
        rng: the only source of chance.
        richness: how likely an optional key is written.
    """

    def __init__(self, rng: random.Random, richness: float = 0.2) -> None:
        self.rng, self.richness = rng, richness
        self.definitions: Mapping[str, Json] = spec_schema()["$defs"]

    def draw(self, name: str) -> Any:
        """Return a value of the definition ``name``, such as ``mixer.memory`` or ``gate``."""
        return self._value(self.definitions[name], "", 0)

    def _value(self, schema: Json, key: str, depth: int) -> Any:
        if key in SMALL and "const" not in schema:
            return self.rng.choice(SMALL[key])
        if "$ref" in schema:
            return self._value(self.definitions[schema["$ref"].rpartition("/")[2]], key, depth)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self.rng.choice(schema["enum"])
        for several in ("anyOf", "oneOf"):
            if several in schema:
                return self._value(self._option(schema[several], depth), key, depth)
        if "properties" in schema or schema.get("type") == "object":
            return self._mapping(schema, key, depth)
        return self._scalar(schema, key, depth)

    def _option(self, options: list[Json], depth: int) -> Json:
        """Prefer short options deep down, so that every document ends."""
        short = [option for option in options if "$ref" not in option and option.get("type") not in ("object", "array")]
        named = [option for option in short if "enum" in option or "const" in option or option.get("type") == "null"]
        if depth > 6 and (named or short):
            return self.rng.choice(named or short)
        plain = [option for option in options if option.get("$ref", "").endswith("mixer.memory")]
        if depth > 1 and plain:  # compositions of compositions have tests of their own
            return plain[0]
        free = [option for option in options if option.get("type") != "string"]
        return self.rng.choice(free or options)

    def _mapping(self, schema: Json, key: str, depth: int) -> Json:
        found: Json = {}
        required = schema.get("required", ())
        for name, part in schema.get("properties", {}).items():
            wanted = name in required or name == "kind"
            if wanted or self.rng.random() < self.richness / (1 + depth / 4):
                found[name] = self._value(part, name, depth + 1)
        if isinstance(schema.get("additionalProperties"), dict) and schema.get("minProperties", 0):
            for name in ("first", "second"):
                found[name] = self._value(schema["additionalProperties"], name, depth + 1)
        return found

    def _scalar(self, schema: Json, key: str, depth: int) -> Any:
        kind = schema.get("type")
        low = schema.get("minimum", schema.get("exclusiveMinimum", -1))
        high = schema.get("maximum", schema.get("exclusiveMaximum", 1000))
        if kind == "integer":
            return min(high, self.rng.choice((max(low, 1), max(low, 0) + 2, max(low, 0) + 4)))
        if kind == "number":
            fits = [
                number
                for number in NUMBERS
                if (low < number or (low == number and "exclusiveMinimum" not in schema))
                and (number < high or (number == high and "exclusiveMaximum" not in schema))
            ]
            return self.rng.choice(fits)
        if kind == "boolean":
            return self.rng.random() < 0.5
        if kind == "null":
            return None
        if kind == "array":
            if "prefixItems" in schema:
                return self._tuple(schema["prefixItems"], depth)
            return [self._value(schema["items"], key, depth + 1) for _ in range(max(1, schema.get("minItems", 1)))]
        return self.rng.choice(NAMES.get(key, ("input",)))

    def _tuple(self, items: list[Json], depth: int) -> list[Any]:
        drawn = [self._value(item, "", depth + 1) for item in items]
        return sorted(drawn) if all(isinstance(item, float) for item in drawn) else drawn
