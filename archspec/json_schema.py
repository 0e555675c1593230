"""The JSON Schema of documents, made from the schema's models and the catalogue, short forms included.

Three layers of definitions: the strict ones; ``~overlay`` for documents and blocks that ``extends`` others, where a
component may be amended without its kind and nothing is required; and ``~space`` for search files, where besides a
value any node (``choice``, ``range``, ``var``) may stand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from archspec import catalog
from archspec.component import FAMILIES, Component, Family
from archspec.families import Activation, Gate
from archspec.schema import Block, Spec

Json = dict[str, Any]
DIALECT = "https://json-schema.org/draft/2020-12/schema"
FAMILY_MARK = "x-archspec-family"
SEARCH_FAMILIES = ("task", "metric")
NODE: Json = {
    "type": "object",
    "anyOf": [{"required": ["choice"]}, {"required": ["range"]}, {"required": ["var"]}],
    "properties": {
        "choice": {"type": "array", "minItems": 1},
        "range": {"type": "array", "minItems": 2, "maxItems": 2, "items": {"type": "number"}},
        "log": {"type": "boolean"},
        "step": {"type": "number"},
        "var": {"type": "string"},
    },
    "additionalProperties": False,
}


def spec_schema() -> Json:
    """Return the JSON Schema that every spec satisfies."""
    definitions = _definitions()
    definitions.update(_variant(definitions, "~overlay", _same))
    return {
        "$schema": DIALECT,
        "title": "archspec spec",
        "if": {"required": ["extends"]},
        "then": {"$ref": "#/$defs/Spec~overlay"},
        "else": {"$ref": "#/$defs/Spec"},
        "$defs": definitions,
    }


def space_definitions() -> Json:
    """Return the definitions with which a search file's ``space`` is described; ``Spec~space`` is the overlay."""
    definitions = _definitions()
    definitions.update(_variant(definitions, "~overlay", _same))
    definitions["node"] = NODE
    definitions.update(_variant(definitions, "~space", lambda schema: {"anyOf": [{"$ref": "#/$defs/node"}, schema]}))
    return definitions


def _definitions() -> Json:
    catalog.load_blocks()
    found: Json = {}
    for family in FAMILIES.values():
        if family.name in SEARCH_FAMILIES:
            continue
        found[family.name] = _family(family)
        for kind, member in family.members.items():
            found[f"{family.name}.{kind}"] = _member(family, kind, member, found)
    found["Spec"] = _model(Spec, found)
    block = _model(Block, found)
    found["Block"] = {
        "anyOf": [
            {"type": "string", "description": "another block: NAME, or FILE#BLOCK"},
            {"$ref": "#/$defs/Block.full"},
            {"required": ["extends"], "$ref": "#/$defs/Block.full~overlay"},
        ]
    }
    found["Block.full"] = block
    found["Spec"]["properties"]["blocks"]["additionalProperties"] = {"$ref": "#/$defs/Block"}
    for layer in ("Spec", "Block.full"):
        found[layer]["properties"]["extends"] = {"type": "string"}
    return found


def _family(family: Family) -> Json:
    options: list[Json] = []
    short = [
        name
        for name in family.known()
        if not any(info.is_required() for info in _kind(family, name).model_fields.values()) or name in family.presets
    ]
    if short:
        options.append({"enum": short})
    if family.base is Gate:
        options += [{"type": "number"}, {"type": "string", "description": "a name under the mixer's gates"}]
    if family.name == "layout":
        options += [{"type": "string"}, {"type": "array", "items": {"$ref": "#/$defs/layout"}, "minItems": 1}]
    if family.name == "projection":
        options.append({"type": "array", "items": {"$ref": "#/$defs/projection"}})
    if family.name == "output_stage":
        options.append({"enum": list(get_args(Activation)), "description": "a function of every channel"})
    options += [{"$ref": f"#/$defs/{family.name}.{kind}"} for kind in sorted(family.members)]
    return {"title": family.noun, "anyOf": options}


def _kind(family: Family, name: str) -> type[Component]:
    return family.members[family.presets[name][0] if name in family.presets else name]


def _member(family: Family, kind: str, member: type[Component], found: Json) -> Json:
    schema = _model(member, found)
    presets = sorted(name for name, (target, _) in family.presets.items() if target == kind)
    kinds = {"kind": {"enum": [kind, *presets]}}
    inferred = family.default_kind == kind or family.name == "layout"
    required = schema.get("required", []) + ([] if inferred else ["kind"])
    if presets:
        required = [name for name in required if name == "kind"]
    return {**schema, "properties": {**kinds, **schema.get("properties", {})}, "required": required}


def _model(model: type[Any], found: Json) -> Json:
    schema: Json = model.model_json_schema(by_alias=True, ref_template="#/$defs/{model}")
    for name, part in schema.pop("$defs", {}).items():
        found.setdefault(name, _linked(part))
    linked: Json = _linked(schema)
    return linked


def _linked(schema: Any) -> Any:
    """Replace the marks that families leave by references to their definitions."""
    if isinstance(schema, list):
        return [_linked(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if FAMILY_MARK in schema:
        return {"$ref": f"#/$defs/{schema[FAMILY_MARK]}"}
    return {key: _linked(value) for key, value in schema.items() if key != "default"}


def _same(schema: Json) -> Json:
    return schema


def _variant(definitions: Json, suffix: str, wrap: Callable[[Json], Json]) -> Json:
    """Return every strict definition once more, with nothing required and components that may leave out their kind."""
    strict = {name: schema for name, schema in definitions.items() if "~" not in name and name != "node"}
    found: Json = {}
    for name, schema in strict.items():
        relaxed = _relaxed(schema, suffix, wrap)
        if name in FAMILIES:
            amended: Json = {}
            for kind in FAMILIES[name].members:
                for key, value in strict[f"{name}.{kind}"]["properties"].items():
                    if key != "kind":
                        amended.setdefault(key, []).append(_relaxed({"properties": {key: value}}, suffix, wrap))
            properties = {key: {"anyOf": [item["properties"][key] for item in items]} for key, items in amended.items()}
            without_kind = {"type": "object", "not": {"required": ["kind"]}, "additionalProperties": False}
            relaxed["anyOf"].append({**without_kind, "properties": properties})
        elif name == "Spec" and suffix == "~overlay":
            relaxed["required"] = ["name"]
        found[f"{name}{suffix}"] = relaxed
    return found


def _relaxed(schema: Any, suffix: str, wrap: Callable[[Json], Json]) -> Any:
    if isinstance(schema, list):
        return [_relaxed(item, suffix, wrap) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found: Json = {}
    for key, value in schema.items():
        if key == "$ref":
            found[key] = value if "~" in value else f"{value}{suffix}"
        elif key == "required":
            kept = [name for name in value if name == "kind"]
            if kept:
                found[key] = kept
        elif key == "properties":
            found[key] = {
                name: item if name in ("kind", "name", "about", "extends") else wrap(_relaxed(item, suffix, wrap))
                for name, item in value.items()
            }
        elif key in ("minProperties", "default"):
            continue
        else:
            found[key] = _relaxed(value, suffix, wrap)
    return found
