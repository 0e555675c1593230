"""The shipped models and the registered choices as data: what ``archspec list`` and docs/zoo.md show."""

from __future__ import annotations

from collections import Counter
from typing import Any

from archspec import catalog
from archspec.component import FAMILIES
from archspec.explanation import Explanation, coordinates, explain
from archspec.loading import MODELS

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
