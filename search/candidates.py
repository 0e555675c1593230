"""From a drawn document to a candidate: fit, legality, constraints, hash. Nothing is built."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archspec import complexity, loading
from archspec.canonical import architecture_hash
from archspec.errors import Problem, RunError, SpecError
from archspec.lowering import Plan
from archspec.schema import Spec
from archspec.search.constraints import forecast, violations
from archspec.search.points import express
from archspec.search.searchfile import SearchFile, plain
from archspec.search.settings import Fit, Settings
from archspec.search.trial import Trial
from archspec.yamltext import LocatedList, LocatedMap

DUPLICATE = "duplicate"
FIT_DIGITS = 4  # significant digits of a solved number: finer ones would only make equal specs look different


@dataclass(frozen=True)
class Candidate:
    """A legal architecture within the constraints.

    Fields:
        document: the spec as written, plain data; ``spec``: the same, checked.
        hash: of its canonical form.
        figures, plan: see ``constraints.Forecast``.
    """

    document: dict[str, Any]
    spec: Spec
    hash: str
    figures: dict[str, float]
    plan: Plan


@dataclass(frozen=True)
class Rejection:
    """Why a draw was not built.

    Fields:
        rule: what it broke, for counting: ``illegal <path>``, ``fit``, ``constraint <name>``, ``duplicate``.
        reason: the sentence.
        excess: how far it is outside each constraint.
    """

    rule: str
    reason: str
    excess: dict[str, float]
    hash: str = ""


def admit(
    document: LocatedMap, search: SearchFile, is_known: Callable[[str], bool] | None = None
) -> Candidate | Rejection:
    """Return the candidate that a drawn document describes, or why it is none; ``is_known`` as for ``judge``."""
    settings = search.settings
    try:
        if settings.fit is not None:
            document = fitted(document, settings.fit, settings)
        return judge(document, search, is_known=is_known)
    except SpecError as error:
        first = error.problems[0]
        return Rejection(f"illegal {first.path}".strip(), first.message, {})
    except FitError as error:
        return Rejection("fit", str(error), {})


def named(document: LocatedMap, name: str) -> LocatedMap:
    """Return the document under a name, which stands first."""
    found = LocatedMap(document.mark)
    found.put("name", name, document.mark)
    for key, value in document.items():
        if key != "name":
            found.put(key, value, document.marks.get(key, document.mark))
    return found


def judge(
    document: LocatedMap,
    search: SearchFile,
    *,
    exempt: bool = False,
    is_known: Callable[[str], bool] | None = None,
) -> Candidate | Rejection:
    """Return a document as a candidate, or the constraint it breaks; ``exempt`` breaks none.

    ``is_known``: says of a hash whether it is that of an accepted candidate; such a document need not be sized.

    Raises:
        SpecError: when the document is malformed or illegal.
    """
    spec = loading.validate(document)
    for end, choice in (("input", spec.input), ("output", spec.output)):
        if choice.kind != "tokens":
            message = f"the tasks of a search are sequences of tokens, found {choice.kind}; use 'tokens'."
            raise SpecError([Problem(*document.marks.get(end, document.mark), end, message)])
    code = architecture_hash(spec)
    if is_known is not None and is_known(code):
        return Rejection(DUPLICATE, "the same architecture as an earlier one", {}, code)
    found = forecast(spec, search.settings, search.objectives)
    broken = [] if exempt else list(violations(found, search.settings))
    if broken:
        excess = {item.constraint: item.excess for item in broken}
        return Rejection(f"constraint {broken[0].constraint}", "; ".join(item.reason for item in broken), excess, code)
    return Candidate(plain(document), spec, code, found.figures, found.plan)


def read_back(code: str, path: Path, search: SearchFile) -> Candidate | None:
    """Return an accepted candidate from the file of its spec; None when that is gone or damaged."""
    try:
        found = judge(loading.read(path), search, exempt=True)
    except SpecError:
        return None
    return found if isinstance(found, Candidate) and found.hash == code else None


def drawn_again(trial: Trial, path: Path, search: SearchFile) -> Candidate:
    """Return the candidate at an accepted trial's coordinates.

    Raises:
        RunError: when it is not the one that was accepted.
    """
    found = admit(named(express(search.space, trial.coordinates, "")[0], trial.name), search)
    if isinstance(found, Rejection) or found.hash != trial.hash:
        raise RunError(
            f"{path}: the spec of trial {trial.number} is gone or damaged, and its coordinates do not give it again; "
            "restore the file or start a new study"
        )
    return found


class FitError(ValueError):
    """No value of the fitted field meets its target."""


def fitted(document: LocatedMap, fit: Fit, settings: Settings) -> LocatedMap:
    """Return the document with the fitted field solved: the value whose figure is closest to the target.

    The figure must not fall as the value grows. Whole numbers stay whole.

    Raises:
        SpecError: when the document is illegal at the values tried.
        FitError: when the closest value misses the target by more than the tolerance.
    """
    start = value_at(document, fit.vary[0])
    if not isinstance(start, int | float) or isinstance(start, bool):
        raise FitError(f"{fit.vary[0]} is {start!r} in this draw; 'fit' needs a number there")

    def at(value: float) -> LocatedMap:
        found = document
        for path in fit.vary:
            found = with_value(found, path, value)
        return found

    def figure(value: float) -> float:
        spec = loading.validate(at(value))
        return float(getattr(complexity.predict(spec, settings.vocab_size, settings.context), fit.metric))

    step = fit.multiple_of if isinstance(start, int) else 1
    value = step * closest(
        lambda count: figure(step * count),
        max(1, start // step) if step > 1 else start,
        fit.target,
        enough=fit.tolerance / 10,
    )
    reached = figure(value)
    if abs(reached - fit.target) > fit.tolerance * fit.target:
        raise FitError(
            f"no {fit.vary[0]} gives {fit.metric}={fit.target:,.0f} within {fit.tolerance:.1%}; "
            f"the closest is {reached:,.0f}, at {value:g}"
        )
    return at(value)


def closest(
    figure: Callable[[float], float], start: float, target: float, *, factor: float = 1024.0, enough: float = 0.0
) -> float:
    """Return the argument, within ``factor`` of ``start``, at which a growing function is closest to a target.

    Real arguments are rounded to ``FIT_DIGITS``. Interpolation and bisection take turns: figures are nearly linear in
    a width, but rounding to multiples makes steps of them. ``enough``: a relative miss at which to stop looking.
    """
    whole, known = isinstance(start, int), dict[float, float]()

    def at(argument: float) -> float:
        if argument not in known:
            known[argument] = figure(argument)
        return known[argument]

    low = high = start
    while at(high) < target and high < start * factor:
        low, high = high, high * 2
    while at(low) > target and low > start / factor and not (whole and low == 1):
        low, high = low // 2 if whole else low / 2, low
    bisecting = False
    while (high - low > 1) if whole else (high - low > 10.0**-FIT_DIGITS * high):
        share = 0.5 if bisecting or at(high) == at(low) else (target - at(low)) / (at(high) - at(low))
        middle = low + min(max(share, 0.02), 0.98) * (high - low)
        middle = min(max(round(middle), low + 1), high - 1) if whole else float(f"{middle:.{FIT_DIGITS + 1}g}")
        if abs(at(middle) - target) <= enough * target:
            low = high = middle
        elif middle in (low, high):
            break
        else:
            low, high = (middle, high) if at(middle) < target else (low, middle)
        bisecting = not bisecting
    ends = [low, high] if whole else [float(f"{end:.{FIT_DIGITS}g}") for end in (low, high)]
    return min(ends, key=lambda end: abs(at(end) - target))


def steps_of(path: str) -> list[str | int]:
    """Return the steps of a document path such as ``layout.of[0].repeat``."""
    found = re.findall(r"[^.\[\]]+|\[\d+\]", path)
    return [int(step[1:-1]) if step.startswith("[") else step for step in found]


def value_at(document: Any, path: str) -> Any:
    """Return what stands at a path; None when nothing does."""
    for step in steps_of(path):
        try:
            document = document[step]
        except (KeyError, IndexError, TypeError):
            return None
    return document


def with_value(document: Any, path: str, value: Any) -> Any:
    """Return the document with another value at a path; the original is left as it is."""
    return _with(document, steps_of(path), value)


def _with(data: Any, steps: list[str | int], value: Any) -> Any:
    if not steps:
        return value
    step = steps[0]
    if isinstance(data, LocatedMap) and isinstance(step, str):
        copied = LocatedMap(data.mark, data)
        copied.marks = dict(data.marks)
        copied.put(step, _with(data.get(step), steps[1:], value), data.marks.get(step, data.mark))
        return copied
    items = LocatedList(data.mark, data)
    items.marks = list(data.marks)
    items[int(step)] = _with(data[int(step)], steps[1:], value)
    return items
