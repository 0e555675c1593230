"""The shipped models and the registered choices as data: what ``archspec list`` and docs/zoo.md show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from archspec import catalog
from archspec.component import FAMILIES, Component, StrictModel
from archspec.explanation import Explanation, coordinates, explain
from archspec.loading import MODELS, load
from archspec.schema import MemoryMixer

CHOICE_FAMILIES = (
    "memory",
    "bias",
    "retention",
    "update",
    "feature",
    "gate",
    "projection",
    "norm",
    "position",
    "feed_forward",
    "mixer",
    "node",
)

PROJECTIONS = ("qkv", "qk", "query", "key", "value")


def models(context: int = 2048) -> list[dict[str, Any]]:
    """Return one row a shipped model: name, coordinates, family, sizes, fidelity and source."""
    return [_row(explain(path, context=context), path.name) for path in sorted(MODELS.glob("*.yaml"))]


def _row(found: Explanation, file: str) -> dict[str, Any]:
    mixers = found.mixers()
    counts = Counter(path for layer in found.plan.layers for path in layer)
    about = found.spec.about
    return {
        "name": found.spec.name,
        "coordinates": " + ".join(dict.fromkeys(coordinates(mixers[path]) for path in counts)),
        "family": " + ".join(dict.fromkeys(found.plan.decisions[path].family for path in counts)),
        "parameters": found.complexity.parameters,
        "state_bytes": found.complexity.state_bytes(found.context),
        "fidelity": about.fidelity,
        "source": about.source,
        "title": about.title,
        "equations": about.equations,
        "differs": about.differs,
        "layers": len(found.plan.layers),
        "file": file,
    }


def choices() -> list[dict[str, Any]]:
    """Return one row a registered choice: its family, kind, presets and what it is."""
    catalog.load_blocks()
    rows = []
    for name in CHOICE_FAMILIES:
        family = FAMILIES[name]
        for kind, member in sorted(family.members.items()):
            presets = ", ".join(sorted(preset for preset, (target, _) in family.presets.items() if target == kind))
            first = (member.__doc__ or "").strip().split("\n\n")[0].split("\n")[0]
            rows.append({"choice": family.noun, "kind": kind, "presets": presets, "definition": first})
    return rows


def components() -> list[dict[str, Any]]:
    """Return one row a registered choice: the shipped models that make it, by name."""
    catalog.load_blocks()
    users: dict[tuple[str, str], list[str]] = {}
    for path in sorted(MODELS.glob("*.yaml")):
        spec = load(path)
        for used in sorted(set(_choices_in(spec))):
            users.setdefault(used, []).append(spec.name)
    rows = []
    for name in CHOICE_FAMILIES:
        for kind in sorted(FAMILIES[name].members):
            models = users.get((name, kind), [])
            rows.append({"choice": FAMILIES[name].noun, "kind": kind, "rows": len(models), "models": ", ".join(models)})
    return rows


def components_page() -> str:
    """Return docs/components.md: every choice with the shipped models that make it."""
    lines = [
        "# Components and the models that use them",
        "",
        "Every choice that a spec can make is one file. Those with no model here, or one, are coordinates of the "
        "space: they combine with the others like any. Written by `archspec list components --markdown`.",
    ]
    found = ""
    for row in components():
        if row["choice"] != found:
            found = row["choice"]
            lines += ["", f"## {found[0].upper()}{found[1:]}", "", "| kind | models | which |", "|---|---|---|"]
        lines.append(f"| `{row['kind']}` | {row['rows']} | {row['models']} |")
    return "\n".join([*lines, ""])


def _choices_in(value: Any) -> Iterator[tuple[str, str]]:
    """Yield (family, kind) of every component inside a document, projections as they are after amending."""
    if isinstance(value, Component):
        yield value.family, value.kind
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _choices_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _choices_in(item)
    elif isinstance(value, StrictModel):
        amended = isinstance(value, MemoryMixer)
        for name in type(value).model_fields:
            if not (amended and name in PROJECTIONS):
                yield from _choices_in(getattr(value, name))
        if isinstance(value, MemoryMixer):
            for projection in ("query", "key", "value"):
                yield from _choices_in(value.projection(projection))  # type: ignore[arg-type]


def bibtex(rows: list[dict[str, Any]]) -> str:
    """Return the models' arXiv and DOI sources as BibTeX entries."""
    entries = []
    for row in rows:
        scheme, _, number = row["source"].partition(":")
        if not number:
            continue
        field = f"eprint = {{{number}}}, archivePrefix = {{arXiv}}" if scheme == "arXiv" else f"doi = {{{number}}}"
        entries.append(f"@misc{{{row['name']},\n  title = {{{row['title']}}},\n  {field}\n}}")
    return "\n\n".join(entries)
