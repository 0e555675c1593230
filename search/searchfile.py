"""Search files: loading with located errors, overrides, and the frozen form that a run keeps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archspec import catalog, loading
from archspec.errors import Problem, SpecError, nearest
from archspec.loading import Model, dotted
from archspec.search.consistency import DocumentPath, inconsistencies, objective
from archspec.search.families import Metric, Task
from archspec.search.names import Direction, Objective
from archspec.search.settings import Settings, directions_of
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

# What may differ when a run is continued: it changes how long the search goes on, not what it does.
CONTINUABLE = ("trials", "timeout_s", "workers", "evaluation_timeout_s", "cache", "resources", "recheck")


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
        for path, message in inconsistencies(settings, space)
    ]
    if problems:
        raise SpecError(problems)
    objectives = tuple(objective(item, settings) for item in settings.objectives)
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
