"""What the parts of a search file say of each other: what one leaves to another, and where they contradict."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from archspec.errors import unknown
from archspec.loading import is_node
from archspec.lowering import FAMILIES as LOWERING
from archspec.search.names import COSTS, FIGURES, Direction, Objective
from archspec.search.points import known_coordinates, parameters
from archspec.search.settings import ObjectiveSetting, Rung, Settings, directions_of
from archspec.search.space import Space

PREFERRED = ("recall_at_init", "memory_capacity")
RULE_FAMILIES = tuple(family.name for family in LOWERING)

DocumentPath = tuple[str | int, ...]


def promotion_metrics(settings: Settings, index: int) -> tuple[str, ...]:
    """Return what a rung promotes by: what it says, else its best-founded metrics, or the primary scores."""
    rung = settings.ladder[index]
    if rung.promote is not None and rung.promote.by:
        return rung.promote.by
    if rung.rung == "short_train":
        return settings.primary_scores
    kinds = list(directions_of(rung))
    return tuple(kind for kind in PREFERRED if kind in kinds) or tuple(kind for kind in kinds if kind not in FIGURES)


def inconsistencies(settings: Settings, space: Space) -> Iterator[tuple[DocumentPath, str]]:
    """Yield (path in the document, what is wrong there) for what the settings and the space say of each other."""
    yield from _task_faults(settings)
    yield from _ladder_faults(settings)
    yield from _objective_faults(settings)
    yield from _known_faults(settings, space)
    for name in settings.soft_constraints:
        if name not in (known := _objective_directions(settings)):
            yield ("soft_constraints", name), unknown("metric", name, known)
    families = settings.constraints.families
    for family in families or ():
        if family not in RULE_FAMILIES:
            yield ("constraints", "families"), unknown("rule family", family, RULE_FAMILIES)
    if settings.fit is not None:
        for path in settings.fit.vary:
            if not _exists(space.base(), path):
                yield ("fit", "vary"), f"there is nothing at {path!r} in the space's first draw."
    if settings.device.partition(":")[0] not in ("cpu", "cuda"):
        yield ("device",), f"found {settings.device!r}; required: cpu or cuda."


def _known_faults(settings: Settings, space: Space) -> Iterator[tuple[DocumentPath, str]]:
    among = parameters(space) if settings.known else {}
    for index, point in enumerate(settings.known):
        try:
            known_coordinates(space, among, point)
        except KeyError as error:
            yield ("known", index), unknown("parameter", str(error.args[0]), list(among))
        except ValueError as error:
            name = str(error)
            values = among[name]
            options = ", ".join(values) if isinstance(values, tuple) else f"{values.low:g} to {values.high:g}"
            yield ("known", index, name), f"no such value of this parameter; required: one of {options}."


def _task_faults(settings: Settings) -> Iterator[tuple[DocumentPath, str]]:
    for name in settings.tasks:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            yield ("tasks", name), "a task's name consists of letters, digits, dots, dashes and underscores."


def _ladder_faults(settings: Settings) -> Iterator[tuple[DocumentPath, str]]:
    last = len(settings.ladder) - 1
    if last < 0:
        yield ("ladder",), "the ladder has no rung; required: at least a short_train rung."
        return
    for index, rung in enumerate(settings.ladder):
        where: DocumentPath = ("ladder", index)
        if index and rung.candidates is not None:
            yield (*where, "candidates"), "candidates are drawn at the first rung only; remove it here."
        if not index and rung.candidates is None and settings.trials is None:
            yield where, "the first rung needs 'candidates': how many distinct feasible draws a round takes."
        if index and rung.rung == "training_free":
            yield (*where, "rung"), "only the first rung can be training_free; the ladder goes up in cost."
        if index == last and rung.promote is not None:
            yield (*where, "promote"), "the last rung promotes to nowhere; remove 'promote' or add a rung."
        if index < last and rung.promote is None:
            yield where, "needs 'promote': how many go on to the next rung, by what, and how many at random."
        if isinstance(rung.tokens, dict) and set(rung.tokens) != set(settings.tasks):
            yield (*where, "tokens"), f"must say a number for each task: {', '.join(settings.tasks)}."
        if rung.promote is not None:
            yield from _promotion_faults(settings, index)
        if rung.continues:
            yield from _continuation_faults(settings, index)
    if settings.ladder[last].rung != "short_train":
        yield ("ladder", last, "rung"), "the last rung must be short_train: final scores come from training."


def _continuation_faults(settings: Settings, index: int) -> Iterator[tuple[DocumentPath, str]]:
    rung, recipe = settings.ladder[index], settings.training
    where: DocumentPath = ("ladder", index, "continues")
    below = settings.ladder[index - 1] if index else None
    if below is None or below.rung != "short_train":
        yield where, "there is no short_train rung below to continue from; remove 'continues'."
        return
    if recipe.schedule != "constant" or recipe.warmup_tokens is None:
        yield (
            where,
            (
                "a run can only be continued under training: {schedule: constant, warmup_tokens: N}: under any other "
                "schedule a shorter run is not the beginning of a longer one."
            ),
        )
    if rung.seconds is not None or below.seconds is not None:
        yield where, "needs budgets in tokens, on the rung below too."
    elif any(settings.tokens_of(rung, name) <= settings.tokens_of(below, name) for name in settings.tasks):
        yield where, "needs more tokens than the rung below, for every task."
    if (rung.seeds or recipe.seeds) > (below.seeds or recipe.seeds):
        yield where, "has more seeds than the rung below; give both the same."


def _promotion_faults(settings: Settings, index: int) -> Iterator[tuple[DocumentPath, str]]:
    rung = settings.ladder[index]
    known = sorted(rankable(settings, rung))
    for name in promotion_metrics(settings, index):
        if name not in known:
            yield ("ladder", index, "promote", "by"), unknown("metric of this rung", name, known)


def rankable(settings: Settings, rung: Rung) -> dict[str, Direction]:
    """Return what a rung can promote by, with directions."""
    own = directions_of(rung) if rung.rung == "training_free" else settings.score_directions
    return {**FIGURES, **own}


def _objective_faults(settings: Settings) -> Iterator[tuple[DocumentPath, str]]:
    if not settings.objectives:
        yield ("objectives",), "there is no objective; required: at least one."
    known = _objective_directions(settings)
    names = [_objective_name(item) for item in settings.objectives]
    for index, item in enumerate(settings.objectives):
        where: DocumentPath = ("objectives", index)
        if item.metric not in known:
            yield (*where, "metric"), unknown("metric", item.metric, known)
        elif item.direction not in (None, known[item.metric]) and item.metric in settings.score_directions:
            yield (*where, "direction"), f"{item.metric} is better when {known[item.metric]}d; found {item.direction}."
        if item.metric != "state_bytes" and (item.at_length or item.dtype):
            yield where, "'at_length' and 'dtype' belong to state_bytes."
        if names.index(_objective_name(item)) != index:
            yield where, f"{item.metric} stands twice; keep one."
    if len(settings.objectives) > 4:
        yield ("objectives",), f"found {len(settings.objectives)}; at most 4 can be weighed against each other."


def _objective_directions(settings: Settings) -> dict[str, Direction]:
    found: dict[str, Direction] = {**FIGURES, **COSTS}
    for rung in settings.ladder:
        found.update(directions_of(rung))
    return {**found, **settings.score_directions}


def _objective_name(item: ObjectiveSetting) -> str:
    return item.metric if item.at_length is None else f"{item.metric}@{item.at_length}"


def objective(item: ObjectiveSetting, settings: Settings) -> Objective:
    """Return an objective with its name, direction and length resolved."""
    direction = item.direction or _objective_directions(settings)[item.metric]
    dtype = (item.dtype or "float32") if item.metric == "state_bytes" else None
    at_length = (item.at_length or settings.context) if item.metric == "state_bytes" else None
    return Objective(_objective_name(item), item.metric, direction, item.reference, at_length, dtype)


def _exists(document: Any, path: str) -> bool:
    for step in re.findall(r"[^.\[\]]+|\[\d+\]", path):
        key: Any = int(step[1:-1]) if step.startswith("[") else step
        try:
            document = document[key]
        except (KeyError, IndexError, TypeError):
            return False
    return not is_node(document)
