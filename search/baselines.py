"""Known architectures beside the candidates: the same coordinates, resized to the same number of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archspec import complexity, loading
from archspec.errors import RunError, SpecError
from archspec.search.candidates import Candidate, Rejection, admit, closest, judge, named, value_at, with_value
from archspec.search.searchfile import SearchFile, plain
from archspec.search.settings import Baseline
from archspec.yamltext import LocatedMap

TOLERANCE = 0.05
GRID = 1.25  # ratio of the widths first tried; the best one's neighbourhood is then tried at every multiple of STEP
STEP = 4
NEIGHBOURS = 3  # widths whose feed-forwards are tried when no width alone comes near
WIDEST = 65536
SCALED = ("key_dim", "value_dim", "dim")


@dataclass(frozen=True)
class Known:
    """A baseline ready to run: its name, what it became, and what a reader must know of it."""

    name: str
    candidate: Candidate
    note: str


def baselines(search: SearchFile) -> list[Known]:
    """Return the baselines of a search file, resized, in their order.

    Raises:
        SpecError: when one cannot be loaded.
        RunError: when no width comes near the budget.
    """
    found: list[Known] = []
    for setting in search.settings.baselines:
        document = _load(setting, search.folder)
        spec = loading.validate(document)
        name = setting.name or spec.name
        note = "as published; not resized"
        if setting.resize:
            document, note = resized(document, setting.budget or budget(search), search.settings.vocab_size)
        candidate = judge(document, search, exempt=True)
        if isinstance(candidate, Rejection):  # exempt from constraints: nothing is left to break
            raise RunError(f"baseline {name}: {candidate.reason}")
        if name in [known.name for known in found]:
            raise RunError(f"baselines: two are called {name!r}; give one a 'name'")
        found.append(Known(name, candidate, note))
    return found


def budget(search: SearchFile) -> int:
    """Return the non-embedding parameters that baselines aim at: the fit's target, else the space's first draw.

    Raises:
        RunError: when that draw is illegal, so that there is no base to be compared with.
    """
    fit = search.settings.fit
    if fit is not None and fit.metric == "non_embedding_parameters":
        return round(fit.target)
    base = named(search.space.base(), "base")
    found = admit(base, search)
    if isinstance(found, Candidate):
        return int(found.figures["non_embedding_parameters"])
    if found.rule.startswith("constraint"):
        return complexity.predict(loading.validate(base), search.settings.vocab_size).non_embedding_parameters
    raise RunError(
        f"baselines: the space's first draw, which they are sized by, is not legal ({found.reason}); "
        "put legal options first, or give each baseline a 'budget'"
    )


def resized(document: LocatedMap, target: int, vocab_size: int) -> tuple[LocatedMap, str]:
    """Return the document at the width whose non-embedding parameters are closest to ``target``, with a note.

    Head sizes, streams and the feed-forward's rounding scale with the width; ratios, counts of heads and layers and
    every choice stay. Widths come in steps, so where the closest misses by more than ``TOLERANCE``, the inner width
    of the feed-forwards makes up for it.

    Raises:
        RunError: when no width is legal.
    """
    spec = loading.validate(document)
    sizes: dict[int, int] = {}

    def size(width: int) -> int | None:
        if width not in sizes:
            found = _size(at_width(document, spec.model_dim, width), vocab_size)
            if found is not None:
                sizes[width] = found
        return sizes.get(width)

    width = float(2 * STEP)
    while width <= WIDEST:
        found = size(round(width / STEP) * STEP)
        if found is not None and found > 2 * target:
            break
        width = max(width * GRID, width + STEP)
    if not sizes:
        raise RunError(f"baseline {spec.name}: no width up to {WIDEST} is legal; give it as 'resize: false'")
    near = min(sizes, key=lambda width: abs(sizes[width] - target))
    # Up to the legal widths on either side: heads that are counted make most widths illegal.
    below = max((width for width in sizes if width < near), default=round(near / GRID / STEP) * STEP)
    above = min((width for width in sizes if width > near), default=round(near * GRID / STEP) * STEP)
    for other in range(max(below, STEP), above + 1, STEP):
        size(other)
    tried = [
        _nearest(document, spec.model_dim, width, target, vocab_size)
        for width in sorted(sizes, key=lambda width: (_missed(sizes[width], target), width))[:NEIGHBOURS]
    ]
    # A width alone that is near enough keeps the feed-forward's shape.
    alone = [entry for entry in tried[:1] if _missed(sizes[entry[2]], target) <= TOLERANCE]
    made, reached, _, note = min(alone or tried, key=lambda entry: _missed(entry[1], target))
    missed = _missed(reached, target)
    note = f"{note} for {target:,} non-embedding parameters: {reached:,}"
    return made, note if missed <= TOLERANCE else f"{note}, {missed:.0%} off, no width is closer"


def _nearest(
    document: LocatedMap, model_dim: int, width: int, target: int, vocab_size: int
) -> tuple[LocatedMap, int, int, str]:
    """Return the document at a width, its size, the width and a note; feed-forwards make up for what is missed."""
    made, note = at_width(document, model_dim, width), f"model_dim {model_dim} -> {width}"
    size = _size(made, vocab_size) or 0
    if _missed(size, target) > TOLERANCE:
        factor = closest(lambda factor: _size(_at_expansion(made, factor), vocab_size) or 0.0, 1.0, target, factor=2.0)
        reached = _size(_at_expansion(made, factor), vocab_size)
        if reached is not None and _missed(reached, target) < _missed(size, target):
            return _at_expansion(made, factor), reached, width, f"{note}, feed-forward x {factor:g}"
    return made, size, width, note


def at_width(document: LocatedMap, model_dim: int, width: int) -> LocatedMap:
    """Return a document with its width and everything that scales with it changed."""
    found: LocatedMap = loading.located(_scaled(plain(document), width / model_dim), document.mark[0])
    found["model_dim"] = width
    return found


def _load(setting: Baseline, folder: Path) -> LocatedMap:
    if isinstance(setting.spec, Mapping):
        document: LocatedMap = loading.located({"name": setting.name or "baseline", **setting.spec}, "<baseline>")
        return loading.resolve(document, folder)
    path = loading.find(setting.spec, folder)
    return loading.resolve(loading.read(path), path.parent)


def _size(document: LocatedMap, vocab_size: int) -> int | None:
    """Return the non-embedding parameters, or None when the document is not legal."""
    try:
        spec = loading.validate(document)
    except SpecError:
        return None
    return complexity.predict(spec, vocab_size).non_embedding_parameters


def _missed(size: int, target: int) -> float:
    return abs(size - target) / target


def _at_expansion(document: LocatedMap, factor: float) -> LocatedMap:
    """Return the document with every feed-forward widened by a factor."""
    found = document
    for name, block in loading.validate(document).blocks.items():
        if block.feed_forward is not None:
            written = value_at(document, f"blocks.{name}.feed_forward")
            fields = {"kind": written} if isinstance(written, str) else dict(written)
            fields["expansion"] = float(f"{block.feed_forward.expansion * factor:.4g}")
            wider = loading.located({**fields, "multiple_of": 1}, document.mark[0])
            found = with_value(found, f"blocks.{name}.feed_forward", wider)
    return found


def _scaled(data: Any, scale: float, key: str = "") -> Any:
    if isinstance(data, Mapping):
        if data.get("value_dim") == 1 and isinstance(data.get("num_heads"), int):
            # A head is a channel of the model, its key a state that does not follow the width.
            return {**data, "num_heads": _multiple(data["num_heads"] * scale, STEP)}
        if key == "feed_forward" and isinstance(data.get("multiple_of"), int) and data["multiple_of"] > 1:
            data = {**data, "multiple_of": min(data["multiple_of"], _multiple(data["multiple_of"] * scale, 2 * STEP))}
        return {name: _scaled(value, scale, name) for name, value in data.items()}
    if isinstance(data, list):
        return [_scaled(item, scale, key) for item in data]
    if key in SCALED and isinstance(data, int) and not isinstance(data, bool):
        return _multiple(data * scale, STEP)
    return data


def _multiple(value: float, of: int) -> int:
    return max(of, round(value / of) * of)
