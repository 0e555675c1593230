"""The documents that draws are made of: the smallest ones, mixers in their places, and what is known of a document."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

from archspec.canonical import architecture_hash
from archspec.errors import SpecError
from archspec.loading import load

Json = dict[str, Any]

MODEL_DIM = 8


@functools.lru_cache(maxsize=100_000)
def is_legal(written: str) -> bool:
    try:
        load(json.loads(written))
    except SpecError:
        return False
    return True


@functools.lru_cache(maxsize=10_000)
def are_two_functions(first: str, second: str) -> bool:
    """Whether two documents are legal and canonically different."""
    try:
        return architecture_hash(load(json.loads(first))) != architecture_hash(load(json.loads(second)))
    except SpecError:
        return False


def document(mixer: Json) -> Json:
    """Return a document of one block with this mixer."""
    return {"name": "drawn", "model_dim": MODEL_DIM, "blocks": {"main": {"mixer": mixer}}, "layout": "main"}


WRITES: Json = {"memory": "matrix", "update": "gradient_descent"}
ATTENDS: Json = {"memory": "kv", "update": "nonparametric"}


def smallest_composition(kind: str, properties: Json) -> Json:
    """Return the smallest mixer of this kind, with two children where it has several."""
    found: Json = {"kind": kind}
    if "experts" in properties:
        found["experts"] = 2
    if "attention" in properties:
        return {**found, "memory": WRITES, "attention": ATTENDS, "segment": 4}
    of = properties["of"]
    if of.get("type") == "array":
        return {**found, "of": [WRITES, WRITES]}
    return {**found, "of": WRITES if "$ref" in of else {"first": WRITES, "second": WRITES}}


def mixers_of(found: Json) -> Iterator[tuple[str | int, ...]]:
    for name in ("memory", "attention"):
        if name in found:
            yield (name,)
    of = found.get("of", {})
    if "memory" in of:
        yield ("of",)
    else:
        yield from (("of", key) for key in (range(len(of)) if isinstance(of, list) else of))


def document_with(smallest: Json, path: tuple[str | int, ...], mixer: Json) -> Json:
    return document(put(smallest, path, mixer))


def put(found: Json, path: tuple[str | int, ...], mixer: Json) -> Json:
    copied: Json = json.loads(json.dumps(found))
    inner: Any = copied
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = mixer
    return copied
