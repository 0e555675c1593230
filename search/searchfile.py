"""Search files: loading with located errors, overrides, and the frozen form that a run keeps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archspec import catalog, loading
from archspec.errors import Problem, SpecError, nearest, unknown
from archspec.loading import Model, dotted, is_node
from archspec.lowering import FAMILIES as LOWERING
from archspec.search.families import Metric, Task
from archspec.search.names import COSTS, FIGURES, Direction, Objective
from archspec.search.points import known_coordinates, parameters
from archspec.search.settings import ObjectiveSetting, Rung, Settings, directions_of
from archspec.search.space import Space, open_space
from archspec.yamltext import LocatedList, LocatedMap, locate, parse

SEARCHES = Path(loading.__file__).parent / "specs" / "searches"
DEFAULT_METRICS = (
    "non_embedding_parameters",
    "flops_per_token",
    "state_size",
    "hidden_covariance",
    "memory_capacity",
    "recall_at_init",
)
PREFERRED = ("recall_at_init", "memory_capacity")
RULE_FAMILIES = tuple(family.name for family in LOWERING)

# What may differ when a run is continued: it changes how long the search goes on, not what it does.
CONTINUABLE = ("trials", "timeout_s", "workers", "evaluation_timeout_s", "cache", "resources", "recheck")

DocumentPath = tuple[str | int, ...]


@dataclass(frozen=True)
class SearchFile:
    """A checked search file.

    Fields:
        settings: everything but the space.
        space: the space.
        objectives: the axes of the front, with directions and names resolved.
        document: the whole file as resolved (``extends`` carried out, overrides in place), plain data.
        name: what the file is called in messages; ``folder``: what its paths are relative to.
    """

    settings: Settings
    space: Space
    objectives: tuple[Objective, ...]
    document: dict[str, Any]
    name: str
    folder: Path

    @property
    def metrics(self) -> dict[str, Direction]:
        """Training-free metric -> direction, over all rungs."""
        return {kind: way for rung in self.settings.ladder for kind, way in directions_of(rung).items()}

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules outside this package that define its tasks and metrics."""
        components: list[Any] = [*self.settings.tasks.values()]
        components += [metric for rung in self.settings.ladder for metric in rung.metrics or ()]
        names = dict.fromkeys(type(item).__module__ for item in components)
        return tuple(name for name in names if not name.startswith("archspec."))


def load_search_file(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    tasks: Mapping[str, Task] | None = None,
    metrics: Sequence[Metric] | None = None,
    changes: Mapping[str, Any] | None = None,
    folder: Path | None = None,
) -> SearchFile:
    """Return the checked search file.

    Args:
        source: a file, the name of a shipped search, or a mapping.
        overrides: ``a.b=c`` texts, c in YAML.
        tasks: replace the file's tasks; ``metrics`` those of its training-free rungs.
        changes: top-level keys to set, None left out (the command line's flags).
        folder: what paths in it are relative to; default: the file's folder, or the working directory.

    Raises:
        SpecError: with every problem found, with file, line and document path.
    """
    if isinstance(source, Mapping):
        document, beside, name = loading.located(source, "<mapping>"), Path.cwd(), "<mapping>"
    else:
        path = find_search(str(source))
        document, beside, name = loading.read(path), path.parent, str(source)
        if "study" not in document:
            document.put("study", path.stem, (str(source), 0))
    for text in overrides:
        override(document, text)
    for key, value in (changes or {}).items():
        if value is not None:
            document.put(key, loading.located(value, "<option>"), ("<option>", 0))
    return _checked(document, folder or beside, name, tasks, metrics)


def find_search(name: str) -> Path:
    """Return the file of a search: a path, or the name of a shipped one.

    Raises:
        SpecError: when there is none.
    """
    given = Path(name).expanduser()
    for path in (given, SEARCHES / (name if given.suffix else f"{name}.yaml")):
        if path.is_file():
            return path
    known = [path.stem for path in SEARCHES.glob("*.yaml")]
    message = f"no such search file, nor a shipped one of that name.{nearest(given.stem, known)}"
    raise SpecError([Problem(name, 0, "", message)])


def override(document: LocatedMap, text: str) -> None:
    """Carry out ``a.b[0].c=value`` in place; the path below its last existing part is created.

    Raises:
        SpecError: when the text is no such thing, or its path runs through a scalar.
    """
    left, equals, right = text.partition("=")
    origin = f"--set {text}"
    steps: DocumentPath = tuple(
        int(step[1:-1]) if step.startswith("[") else step for step in re.findall(r"[^.\[\]]+|\[\d+\]", left)
    )
    if not equals or not steps:
        raise SpecError([Problem(origin, 0, "", "required: PATH=VALUE, such as --set training.batch_size=32.")])
    value = parse(right, origin) if right.strip() else None
    here: Any = document
    for step, following in zip(steps, (*steps[1:], None), strict=True):
        fits = isinstance(here, LocatedMap) if isinstance(step, str) else isinstance(here, LocatedList)
        if not fits or (isinstance(step, int) and step >= len(here)):
            raise SpecError([Problem(origin, 0, left, f"there is no {step!r} to set; the path ends above it.")])
        if following is None:
            _put(here, step, value, origin)
        elif isinstance(step, str) and (step not in here or here[step] is None):
            _put(here, step, LocatedMap((origin, 0)), origin)
        here = here[step] if following is not None else here


def _put(here: Any, step: str | int, value: Any, origin: str) -> None:
    if isinstance(here, LocatedMap):
        here.put(str(step), value, (origin, 0))
    else:
        here[step] = value
        here.marks[step] = (origin, 0)


def _checked(
    document: LocatedMap,
    folder: Path,
    name: str,
    tasks: Mapping[str, Task] | None,
    metrics: Sequence[Metric] | None,
) -> SearchFile:
    catalog.load_search()
    given = document
    document = _defaults(document, tasks, metrics)
    settings: Settings = _validated(Settings, document, given)
    if not isinstance(document["space"], LocatedMap):
        raise SpecError([Problem(*locate(given, ("space",), (name, 0)), "space", "required: a mapping over a spec.")])
    resolved = loading.resolve(document["space"], folder)
    variables = document.get("variables")
    variables = variables if isinstance(variables, LocatedMap) else LocatedMap((name, 0))
    space = open_space(resolved, variables)
    problems = [
        Problem(*locate(given, path, given.mark), dotted(path), message)
        for path, message in _inconsistencies(settings, space)
    ]
    if problems:
        raise SpecError(problems)
    objectives = tuple(_objective(item, settings) for item in settings.objectives)
    frozen = settings.model_dump(mode="json", by_alias=True, exclude={"space", "variables"}, exclude_none=True)
    frozen = {**frozen, "space": plain(resolved), "variables": plain(variables)}
    return SearchFile(settings, space, objectives, frozen, name, folder)


def plain(data: Any) -> Any:
    """Return located data as plain dicts and lists."""
    if isinstance(data, Mapping):
        return {key: plain(value) for key, value in data.items()}
    return [plain(item) for item in data] if isinstance(data, list | tuple) else data


def differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Yield one line per place where two plain documents differ: ``path: old -> new``."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in dict.fromkeys([*before, *after]):
            if path or key not in CONTINUABLE:
                below = f"{path}.{key}" if path else str(key)
                yield from differences(before.get(key, "(absent)"), after.get(key, "(absent)"), below)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, f"{path}[{index}]")
    elif before != after:
        yield f"{path}: {_brief(before)} -> {_brief(after)}"


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _validated(model: type[Model], document: LocatedMap, given: LocatedMap) -> Model:
    try:
        return loading.validated(model, document)
    except SpecError as error:
        name = given.mark[0]
        problems = [p if p.file != "<document>" else Problem(name, 0, p.path, p.message) for p in error.problems]
        raise SpecError(problems) from None


def _defaults(document: LocatedMap, tasks: Mapping[str, Task] | None, metrics: Sequence[Metric] | None) -> LocatedMap:
    """Return the document with the tasks that its objectives imply, and the default metrics and promotions."""
    found = LocatedMap(document.mark, document)
    found.marks = dict(document.marks)
    if tasks is not None:
        found["tasks"] = dict(tasks)
    elif "tasks" not in found:
        listed = found.get("objectives")
        names = [str(item.get("metric", "")) for item in listed or [] if isinstance(item, Mapping)]
        kinds = [name.partition("/")[0] for name in names if "/" in name]
        found["tasks"] = {kind: {"kind": kind} for kind in dict.fromkeys(kinds)}
    ladder = found.get("ladder")
    if isinstance(ladder, LocatedList):
        rungs = LocatedList(ladder.mark, [_rung_defaults(rung, metrics) for rung in ladder])
        rungs.marks = list(ladder.marks)
        found["ladder"] = rungs
    return found


def _rung_defaults(rung: Any, metrics: Sequence[Metric] | None) -> Any:
    if not isinstance(rung, LocatedMap) or rung.get("rung") != "training_free":
        return rung
    found = LocatedMap(rung.mark, rung)
    found.marks = dict(rung.marks)
    if metrics is not None:
        found["metrics"] = list(metrics)
    elif "metrics" not in found:
        found["metrics"] = list(DEFAULT_METRICS)
    return found


def promotion_metrics(settings: Settings, index: int) -> tuple[str, ...]:
    """Return what a rung promotes by: what it says, else its best-founded metrics, or the primary scores."""
    rung = settings.ladder[index]
    if rung.promote is not None and rung.promote.by:
        return rung.promote.by
    if rung.rung == "short_train":
        return settings.primary_scores
    kinds = list(directions_of(rung))
    return tuple(kind for kind in PREFERRED if kind in kinds) or tuple(kind for kind in kinds if kind not in FIGURES)


def _inconsistencies(settings: Settings, space: Space) -> Iterator[tuple[DocumentPath, str]]:
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


def _objective(item: ObjectiveSetting, settings: Settings) -> Objective:
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
