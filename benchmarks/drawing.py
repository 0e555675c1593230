"""Draws documents from the grammar: its JSON Schema says what can be written, its rules what each coordinate may be.

Whatever the catalogue holds is drawn, plug-ins and new files included; nothing here names a choice. A document is
drawn in two steps:

1. the four choices, one after the other, evenly from the kinds that are legal with those before in their smallest form,
   and where gradients are taken, at the token or at an anchor, evenly wherever that makes another function;
2. every other coordinate by itself, evenly from the values that are legal for it *beside those four kinds alone*.
   What two such coordinates mean for each other is left to chance, so that a document can be illegal.

``conditional=False`` leaves out both conditions: the share of legal documents then says how often the schema alone
is enough.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from archspec.component import FAMILIES
from archspec.json_schema import spec_schema
from benchmarks.documents import (
    MODEL_DIM,
    WRITES,
    Json,
    are_two_functions,
    document,
    document_with,
    is_legal,
    mixers_of,
    put,
    smallest_composition,
)

Wrap = Callable[[Json], Json]

CHOICES = ("memory", "bias", "retention", "update")
NUMBERS = (0.5, 1.0, 0.9, 0.1, 2.0, 0.0, -0.5, 1.5, 3.0)
"""Numbers that keep the recurrences bounded over a few tokens, and those at which formulas like to break."""
SMALL: Mapping[str, tuple[Any, ...]] = {
    "prefix": (0, 1, 2),
    "persistent": (0, 1, 2),
    "segment": (3, 4),
    "conv": (2, 3),
    "iterations": (1, 3, 6),
    "rank": (1, 2),
    "dim": (2, 4),
    "fixed": (2, 4),
    "key_dim": (4,),
    "value_dim": (4,),
    "num_heads": (2,),
    "max_length": (32,),
    "name": ("shared",),
    "ridge": (0.5, 1.0, {"kind": "sigmoid", "floor": 0.5}),  # near zero the system that is solved is singular
    "order": (["norm", "skip", "gate"], ["skip", "norm", "gate"], ["gate", "norm", "skip"], ["norm", "gate", "skip"]),
}
"""Sizes that keep a test short, by key. The order of read-out stages is the one list that is a permutation."""
HEADS = ((2, 4, 4), (1, 8, 8), (2, 4, 2), (1, 3, 4), (4, 2, 2), (2, 2, 1))
"""(num_heads, key_dim, value_dim) for mixers."""
SMALL_STEP: Json = {"step_size": {"kind": "sigmoid", "scale": 0.1}}
UNIT: Json = {"norm": "l2"}
"""What every mixer has unless something else is drawn: on keys of any length, and with steps of 1, most rules that are
not linear grow without bound, as their equations say."""
LAWS = ("constant", "normal", "uniform", "log_uniform", "linspace", "arange", "law")
DRAWN_APART = ("kind", "anchor")
BLOCK = ("norm", "feed_forward", "placement")


class Nothing(Exception):  # noqa: N818 - it is no error: a coordinate has no legal value here and is left out
    """No value of a coordinate is legal."""


class Drawer:
    """Draws whole documents, small enough to train for a step.

    Args:
        rng: the only source of chance.
        richness: how likely an optional key is written.
        conditional: draw each coordinate from what is legal for it, as the module's docstring says.
    """

    def __init__(self, rng: random.Random, richness: float = 0.2, *, conditional: bool = True) -> None:
        self.rng, self.richness, self.conditional = rng, richness, conditional
        self.definitions = _definitions()
        self._frames: list[Callable[[Any], Any]] = []  # how each open coordinate stands in what holds it
        self._wrap: Wrap = document

    def draw(self) -> Json:
        """Return a document: one block, once or twice, with a mixer of memories."""
        self._frames = []
        compositions = sorted(set(FAMILIES["mixer"].members) - {"memory", "cell"})
        mixer = self._composed(self.rng.choice(compositions)) if self.rng.random() < 0.15 else self.mixer()
        found, plain = document(mixer), document(WRITES)
        block = self.definitions["Block.full"]["properties"]
        self._wrap = lambda block: {**plain, "blocks": {"main": block}}
        found["blocks"]["main"].update(self._optional(block, BLOCK, plain["blocks"]["main"], 1))
        self._wrap = lambda spec: spec
        found.update(self._optional(self.definitions["Spec"]["properties"], ("input", "output", "norm"), plain, 1))
        layouts = ("main", ["main", "main"], {"repeat": 2, "of": "main"}, {"cycle": 3, "of": "main"})
        loops = ({"loop": 2, "of": "main", "inject": True, "embed": "coordinates"}, {"loop": 2, "of": "main"})
        found["layout"] = self.rng.choice((*layouts, *loops))
        return found

    def mixer(self, wrap: Wrap | None = None) -> Json:
        """Return a memory mixer; ``wrap`` puts one into the document that it will stand in."""
        self._wrap = wrap or document
        shell = self._four(self._choices("" if wrap is None else json.dumps(wrap({}), sort_keys=True)))
        heads, key_dim, value_dim = self.rng.choice(HEADS)
        shell.update({"num_heads": heads, "value_dim": value_dim})
        if self._legal({**shell, "key_dim": key_dim}):  # a memory may have no keys
            shell["key_dim"] = key_dim
        if "step_size" not in shell["update"] and self._legal({**shell, "update": {**shell["update"], **SMALL_STEP}}):
            shell["update"] = {**shell["update"], **SMALL_STEP}
        if "key_dim" in shell:
            shell["qk"] = UNIT
        if self.rng.random() < 0.3:
            shell["streams"] = {"side": {"kind": "linear", "dim": MODEL_DIM}}
        if self.rng.random() < 0.3:
            shell["gates"] = {"shared": "sigmoid"}
        properties = self.definitions["mixer.memory"]["properties"]
        found = {**shell}
        if "qk" in shell and self.rng.random() < self.richness:
            with suppress(Nothing):  # nothing but unit norm fits beside the four: that stands
                drawn = self._at(shell, "qk", lambda: self._value(properties["qk"], "qk", 1))
                found["qk"] = drawn if isinstance(drawn, list) else {**UNIT, **drawn}
        point = self._evaluation_point(shell)
        for name in CHOICES:
            with suppress(Nothing):  # a required part has no legal value beside the others: the smallest form stands
                found[name] = self._at(shell, name, functools.partial(self._component, name, shell[name]))
        if "step_size" in shell["update"]:
            step = found["update"]["step_size"]
            step = step if isinstance(step, dict) else {"kind": "constant", "value": step}
            found["update"]["step_size"] = {**step, "scale": SMALL_STEP["step_size"]["scale"]}
        found["update"] = {**found["update"], **point}
        drawn = {*shell, "kind", "streams", "gates", "key_dim", "qk"}
        rest = [name for name in properties if name not in drawn]
        found.update(self._optional(properties, rest, shell, 0))
        return found

    def _evaluation_point(self, shell: Json) -> Json:
        """Return ``anchor: token`` or an anchor, one as likely as the other; nothing where both are one function."""
        update = shell["update"]
        documents = [self._wrap({**shell, "update": {**update, "anchor": point}}) for point in ("token", {"every": 2})]
        if self.conditional and not are_two_functions(*(json.dumps(written, sort_keys=True) for written in documents)):
            return {}
        if self.rng.random() < 0.5:
            return {"anchor": "token"}
        anchor = {"every": self.rng.choice((2, 3, 4))}
        properties = _keys_of(self.definitions["Anchor"])
        names = [name for name in properties if name != "every"]
        draw = functools.partial(self._optional, properties, names, anchor, 1)
        return {"anchor": {**anchor, **self._at(shell, "update", lambda: self._at(update, "anchor", draw))}}

    def _composed(self, kind: str) -> Json:
        """A composition: its smallest form first, then every mixer inside drawn in its place, then its own keys."""
        properties = self.definitions[f"mixer.{kind}"]["properties"]
        found = smallest = smallest_composition(kind, properties)
        for path in mixers_of(smallest):
            found = put(found, path, self.mixer(functools.partial(document_with, smallest, path)))
        self._wrap = document
        rest = [name for name in properties if name not in ("kind", "of", "memory", "attention", "share")]
        return {**found, **self._optional(properties, rest, smallest, 1)}

    @functools.cached_property
    def _kinds(self) -> dict[str, list[Json]]:
        """The legal combinations of kinds by place; the same for all who draw under the same conditions."""
        return LEGAL_KINDS[self.conditional]

    def _four(self, legal: list[Json]) -> Json:
        """Draw one choice after the other, evenly from the kinds that are legal with those drawn before."""
        for name in ("memory", "update", "bias", "retention"):
            kind = self.rng.choice(sorted({choices[name]["kind"] for choices in legal}))
            legal = [choices for choices in legal if choices[name]["kind"] == kind]
        return {**self.rng.choice(legal)}

    def _choices(self, place: str) -> list[Json]:
        """Return every combination of the four kinds that is legal in its smallest form, in this place."""
        if place not in self._kinds:
            every = (dict(zip(CHOICES, combination, strict=True)) for combination in self._combinations())
            options: Iterable[Json] = every
            if place:  # what is illegal alone is illegal inside
                wrap, self._wrap = self._wrap, document
                options = self._choices("")
                self._wrap = wrap
            self._kinds[place] = [{**four} for four in options if not self.conditional or self._legal(four)]
        return self._kinds[place]

    def _combinations(self) -> Iterator[tuple[Json, ...]]:
        options = {name: [self._smallest(f"{name}.{kind}") for kind in FAMILIES[name].members] for name in CHOICES}
        starts = self.definitions["memory.matrix"]["properties"]["initial"]["enum"]
        for memory in options["memory"]:
            starting = "initial" in self.definitions[f"memory.{memory['kind']}"]["properties"]
            for start in ({"initial": start} for start in starts) if starting else ({},):
                for bias in options["bias"]:
                    for retention in options["retention"]:
                        for update in options["update"]:
                            yield {**memory, **start}, bias, retention, update

    def _smallest(self, name: str) -> Json:
        """Return the smallest mapping of a definition: its kind and what is required, gates a sigmoid."""
        schema = self.definitions[name]
        found: Json = {"kind": name.partition(".")[2]} if "kind" in schema.get("properties", {}) else {}
        for key in schema.get("required", ()):
            if key != "kind":
                found[key] = self._plain(key, schema["properties"][key])
        if "gate" in schema.get("properties", {}) and name.startswith("retention."):
            found["gate"] = "sigmoid"
        return found

    def _plain(self, key: str, schema: Json) -> Any:
        target = schema.get("$ref", "").rpartition("/")[2]
        if target == "gate":
            return "sigmoid"
        if key in SMALL:
            return SMALL[key][0]
        if target:
            return self._smallest(target)
        if "const" in schema:
            return schema["const"]
        return 2

    def _component(self, family: str, shell: Json) -> Json:
        """Return a component of the kind that ``shell`` has, with optional keys drawn."""
        properties = self.definitions[f"{family}.{shell['kind']}"]["properties"]
        return {
            **shell,
            **self._optional(properties, [name for name in properties if name not in DRAWN_APART], shell, 1),
        }

    def _optional(self, properties: Json, names: Any, shell: Json, depth: int) -> Json:
        """Draw some of the keys ``names`` of a mapping whose smallest form is ``shell``; required ones always."""
        found: Json = {}
        for name in names:
            if name in shell or self.rng.random() < self.richness / (1 + depth / 3):
                try:
                    found[name] = self._at(
                        shell, name, functools.partial(self._value, properties[name], name, depth + 1)
                    )
                except Nothing:
                    continue
        return found

    def _at(self, shell: Json, key: str, draw: Callable[[], Any]) -> Any:
        self._frames.append(lambda value: {**shell, key: value})
        try:
            return draw()
        finally:
            self._frames.pop()

    def _value(self, schema: Json, key: str, depth: int) -> Any:
        if key in SMALL and "const" not in schema and "enum" not in schema:
            return self._fitting(SMALL[key])
        if key in ("from", "of") and schema.get("type") != "object" and "$ref" not in schema and "enum" not in schema:
            return self._fitting(("input", "input", "side", "query", "key", "value"))
        target = schema.get("$ref", "").rpartition("/")[2]
        if target in FAMILIES:
            return self._of_family(target, depth)
        if target:
            return self._value(self.definitions[target], key, depth)
        if "const" in schema:
            return self._fitting([schema["const"]])
        if "enum" in schema:
            return self._fitting(schema["enum"])
        if "anyOf" in schema:
            return self._any(schema["anyOf"], key, depth)
        if schema.get("type") == "object":
            return self._mapping(schema, key, depth)
        return self._scalar(schema, key, depth)

    def _any(self, options: list[Json], key: str, depth: int) -> Any:
        options = [option for option in options if option.get("type") != "null"]
        for option in self.rng.sample(options, len(options)):
            try:
                return self._value(option, key, depth)
            except Nothing:
                continue
        raise Nothing

    def _of_family(self, family: str, depth: int) -> Any:
        """Draw a kind whose smallest form is legal here, then its other keys."""
        if family == "projection" and depth < 3 and self.rng.random() < 0.15:
            return self._parts(depth)
        kinds = list(FAMILIES[family].members)
        numbers = [self.rng.choice(NUMBERS)] if family == "gate" else []  # a bare number is a constant gate
        kind = self._fitting([*numbers, *(self._smallest(f"{family}.{kind}") for kind in kinds)])
        if not isinstance(kind, dict):
            return kind
        properties = self.definitions[f"{family}.{kind['kind']}"]["properties"]
        names = [name for name in properties if name not in ("kind", "parts")]
        return {**kind, **self._optional(properties, names, kind, depth)}

    def _parts(self, depth: int) -> Any:
        """Two parts, as wide together as a head."""
        first, second = self._fitting([[{"dim": a}, {"dim": b}] for a in (1, 2, 4) for b in (1, 2, 4)])
        properties = self.definitions["projection.linear"]["properties"]
        names = [name for name in properties if name not in ("kind", "parts", "dim", "blend")]
        self._frames.append(lambda part: [part, second])
        try:
            return [{**first, **self._optional(properties, names, first, depth + 2)}, second]
        finally:
            self._frames.pop()

    def _mapping(self, schema: Json, key: str, depth: int) -> Json:
        properties = schema.get("properties", {})
        if set(LAWS) <= set(properties):
            law = self.rng.choice(LAWS)
            return {law: self._at({}, law, lambda: self._value(properties[law], law, depth + 1))}
        shell = {name: self._plain(name, properties[name]) for name in schema.get("required", ())}
        if "kind" in properties and "const" in properties["kind"]:
            shell["kind"] = properties["kind"]["const"]
        if not self._fits(shell):
            raise Nothing
        return {**shell, **self._optional(properties, [name for name in properties if name != "kind"], shell, depth)}

    def _scalar(self, schema: Json, key: str, depth: int) -> Any:
        kind = schema.get("type")
        if kind == "integer":
            low = schema.get("minimum", 0)
            return self._fitting([n for n in (1, 2, 3, 4) if low <= n <= schema.get("maximum", 4)])
        if kind == "number":
            return self._fitting([number for number in NUMBERS if _between(number, schema)])
        if kind == "boolean":
            return self._fitting((True, False))
        items = schema.get("items", {}).get("$ref", "").rpartition("/")[2] if kind == "array" else ""
        if items in FAMILIES and items not in ("projection", "mixer", "layout"):
            return self._several(items)
        if kind == "array" and "prefixItems" in schema:
            pairs = [[0.5, 1.0], [-0.5, 0.5], [0.1, 2.0]]
            return self._fitting([p for p in pairs if all(map(_between, p, schema["prefixItems"]))])
        raise Nothing

    def _several(self, family: str) -> Any:
        """Draw one to three components side by side, each in its smallest form, that are legal together."""
        kinds = [self._smallest(f"{family}.{kind}") for kind in FAMILIES[family].members]
        return self._fitting([self.rng.choices(kinds, k=self.rng.randint(1, 3)) for _ in range(12)])

    def _fitting(self, options: Any) -> Any:
        """Return one of the options that are legal here, each as likely as the others."""
        for option in self.rng.sample(list(options), len(options)):
            if self._fits(option):
                return option
        raise Nothing

    def _fits(self, value: Any) -> bool:
        if not self.conditional:
            return True
        for frame in reversed(self._frames):
            value = frame(value)
        return self._legal(value)

    def _legal(self, value: Any) -> bool:
        return is_legal(json.dumps(self._wrap(value), sort_keys=True))


LEGAL_KINDS: dict[bool, dict[str, list[Json]]] = {True: {}, False: {}}


@functools.cache
def _definitions() -> Mapping[str, Json]:
    definitions: Mapping[str, Json] = spec_schema()["$defs"]
    return definitions


def _keys_of(definition: Json) -> Json:
    """Return the properties of a mapping that may have a short form."""
    forms = [definition, *definition.get("anyOf", ())]
    found: Json = next(form["properties"] for form in forms if "properties" in form)
    return found


def _between(number: float, schema: Json) -> bool:
    return (
        schema.get("minimum", number) <= number <= schema.get("maximum", number)
        and ("exclusiveMinimum" not in schema or schema["exclusiveMinimum"] < number)
        and ("exclusiveMaximum" not in schema or number < schema["exclusiveMaximum"])
    )
