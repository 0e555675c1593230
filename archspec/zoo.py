"""The shipped models and the registered choices as data: what ``archspec list`` and docs/zoo.md show."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from archspec import catalog
from archspec.canonical import architecture_hash
from archspec.component import FAMILIES, Component, StrictModel
from archspec.errors import ArchspecError
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
    "output_stage",
    "feed_forward",
    "mixer",
    "node",
    "input",
    "output",
)

BESIDE = "transformer"
AXES = ("memory", "bias", "retention", "update")
LONG = 1 << 20  # tokens; longer than any window
PROJECTIONS = ("qkv", "qk", "query", "key", "value")


def models(context: int = 2048) -> list[dict[str, Any]]:
    """Return one row a shipped model: name, coordinates, family, sizes, fidelity and source."""
    return [_row(explain(path, context=context), path.name) for path in sorted(MODELS.glob("*.yaml"))]


def _row(found: Explanation, file: str) -> dict[str, Any]:
    mixers = found.mixers()
    counts = Counter(path for layer in found.plan.layers for path in layer)
    about = found.spec.about
    kinds = list(dict.fromkeys((coordinates(mixers[path]), found.plan.decisions[path].family) for path in counts))
    axes = [line.split(" x ") for line, _ in kinds]
    return {
        "name": found.spec.name,
        "coordinates": " + ".join(dict.fromkeys(line for line, _ in kinds)),
        **{axis: " + ".join(line[place] for line in axes) for place, axis in enumerate(AXES)},
        "family": " + ".join(family for _, family in kinds),
        "architecture": architecture_hash(found.spec),
        "parameters": found.complexity.parameters,
        "state_bytes": found.complexity.state_bytes(found.context),
        "time": growth(found),
        "fidelity": about.fidelity,
        "source": about.source,
        "title": about.title,
        "equations": about.equations,
        "differs": about.differs,
        "layers": len(found.plan.layers),
        "file": file,
    }


def growth(found: Explanation) -> str:
    """Return how the work of a sequence of T tokens grows: T^2 where each reads all tokens before it, else T."""
    kept = found.complexity.state_bytes
    return "T^2" if kept(4 * LONG) > kept(LONG) else "T"


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


def training(path: Path) -> dict[str, dict[str, Any]]:
    """Return what ``benchmarks.zoo`` found out by training the models: bits per byte, parameters, steps, device.

    Raises:
        ArchspecError: the file cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArchspecError(f"{path}: no JSON that can be read ({error}); name a file of benchmarks.zoo.") from error
    models = found.get("models") if isinstance(found, dict) else None
    if not isinstance(models, dict) or not all(isinstance(row, dict) for row in models.values()):
        raise ArchspecError(f"{path}: found no results under 'models'; name a file of benchmarks.zoo.")
    return models


def page(results: Mapping[str, Mapping[str, Any]] | None = None, context: int = 2048) -> str:
    """Return docs/zoo.md: the shipped models, with their scores where ``results`` has them."""
    rows, results = models(context), results or {}
    columns = ["model", *AXES, "family", "parameters", "state bytes", "time", "fidelity", "source"]
    if results:
        columns.append(f"bits per byte (beside the {BESIDE})")
    lines = [
        "# The zoo",
        "",
        f"The shipped models. State bytes are those of one sequence after {context:,} tokens in fp32; time is how the "
        "work grows with the number T of tokens; the family is the form that runs on a CPU. `exact` means that a test "
        "holds the compiled mixer against a token loop of the published equations; what `differs` is said below. "
        "Several mixers of a model are separated by `+`. Written by `archspec list --markdown`.",
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
    ]
    for row in rows:
        cells = [row["name"], *(row[axis] for axis in AXES), row["family"], f"{row['parameters']:,}"]
        cells += [f"{row['state_bytes']:,}", row["time"], row["fidelity"], row["source"]]
        if results:
            cells.append(_score(row, results))
        lines.append(f"| {' | '.join(cells)} |")
    if results:
        changed = [row["name"] for row in rows if _changed(row, results)]
        since = f" Not trained since they changed: {', '.join(changed)}." if changed else ""
        lines += ["", f"{_conditions(results)}{since}"]
    lines += ["", "## What differs", ""]
    lines += [f"- `{row['name']}`: {row['differs']}" for row in rows if row["differs"]]
    return "\n".join([*lines, ""])


def _changed(row: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a model was another architecture when it was trained."""
    return bool(results.get(row["name"], {}).get("architecture", row["architecture"]) != row["architecture"])


def _score(row: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a model's bits per byte beside those of the transformer, as far as they are there."""
    found = results.get(row["name"], {})
    if _changed(row, results) or "bits_per_byte" not in found:
        return "diverged" if "diverged" in found and not _changed(row, results) else ""
    score, beside = found["bits_per_byte"], results.get(BESIDE, {}).get("bits_per_byte")
    return f"{score:.3f}" if beside is None else f"{score:.3f} ({score - beside:+.3f})"


def _conditions(results: Mapping[str, Mapping[str, Any]]) -> str:
    sizes = sorted(row["parameters"] for row in results.values() if "parameters" in row)
    steps = sorted({row["steps"] for row in results.values() if "steps" in row})
    devices = sorted({row["device"] for row in results.values() if "device" in row})
    return (
        f"Bits per byte on text after {' or '.join(map(str, steps))} steps, at {sizes[0]:,} to {sizes[-1]:,} "
        f"parameters, on {' and '.join(devices)} (`benchmarks.zoo`): that a model trains, not which one is best."
    )


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
