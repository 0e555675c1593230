"""The space of a search: a spec document in which nodes stand where values vary.

    {choice: [a, b, ...]}                      one of several values, which may hold further nodes
    {range: [low, high], log: false, step: s}  a number; whole when both ends and the step are whole
    {var: name}                                a variable of the search file, drawn once and used in several places

A node may stand for any value except ``kind``, ``name``, ``about``, ``extends`` and mapping keys. It is drawn once
where it is written, so that a block that is repeated is the same block. A node inside a choice is drawn only when
that choice is: conditional parameters need no further syntax.

A parameter is called by the place of its node; below a choice, by the option taken: ``blocks.main.mixer.bias/lp/p``.
An option is called by its text (``bias:lp{p: *}``), never by its index, so that a grown space keeps its names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from archspec import catalog, legality, loading
from archspec.errors import Problem, SpecError, nearest
from archspec.loading import NODE_KEYS, dotted, is_node
from archspec.schema import Spec
from archspec.yamltext import LocatedList, LocatedMap, Mark, locate

Path = tuple[str | int, ...]
FIXED_KEYS = ("kind", "name", "about", "extends", "version")


class Chooser(Protocol):
    """Who decides at a node: the sampler, a fixed table, or a random generator."""

    def choose(self, name: str, options: Sequence[str]) -> str: ...
    def number_in(self, name: str, limits: Range) -> float | int: ...


@dataclass(frozen=True)
class Range:
    """The numbers from ``low`` to ``high``, both included; whole ones if ``whole``."""

    low: float
    high: float
    step: float | None
    log: bool
    whole: bool

    @property
    def num_values(self) -> int | None:
        """How many values there are; None for a continuum."""
        if self.whole or self.step is not None:
            return int((self.high - self.low) / (self.step or 1) + 1e-9) + 1
        return None


@dataclass(frozen=True)
class Size:
    """How large a space is.

    Fields:
        settings: number of distinct settings of the discrete parameters.
        discrete: number of discrete parameters, conditional ones included; ``continuous``: of the others.
    """

    settings: int
    discrete: int
    continuous: int


@dataclass(frozen=True)
class _Node:
    """What a range or a choice of one name lets vary: found once, as draws are many.

    Fields:
        limits: of a range.
        options: the names of a choice's options; ``below``: the same in the names of the parameters below them.
    """

    limits: Range | None = None
    options: tuple[str, ...] = ()
    below: tuple[str, ...] = ()

    @classmethod
    def of(cls, node: Mapping[str, Any], name: str) -> _Node:
        if "range" in node:
            return cls(limits=_range(node))
        options = option_names(node, name)
        return cls(options=options, below=_names_below(options))


@dataclass(frozen=True)
class Space:
    """A resolved document with nodes, and the variables it uses."""

    document: LocatedMap
    variables: LocatedMap
    _known: dict[tuple[int, str], _Node] = field(default_factory=dict, init=False, repr=False, compare=False)

    def draw(self, chooser: Chooser) -> LocatedMap:
        """Return the document with every node replaced by what the chooser decides."""
        drawn: dict[str, Filled] = {}

        def variable(name: str) -> Filled:
            if name not in drawn:
                drawn[name] = self._fill(self.variables[name], f"variables.{name}", chooser, variable)
            return drawn[name]

        filled: LocatedMap = self._fill(self.document, "", chooser, variable)[0]
        return filled

    def _fill(self, value: Any, name: str, chooser: Chooser, variable: Variable) -> Filled:
        if isinstance(value, dict) and is_node(value):
            return self._decide(value, name, chooser, variable)
        if isinstance(value, LocatedMap):
            filled = LocatedMap(value.mark)
            for key, item in value.items():
                found, mark = self._fill(item, f"{name}.{key}" if name else key, chooser, variable)
                filled.put(key, found, mark or value.marks.get(key, value.mark))
            return filled, None
        if isinstance(value, LocatedList):
            pairs = [self._fill(item, f"{name}[{index}]", chooser, variable) for index, item in enumerate(value)]
            items = LocatedList(value.mark, [found for found, _ in pairs])
            items.marks = [mark or place for (_, mark), place in zip(pairs, value.marks, strict=True)]
            return items, None
        return value, None

    def _decide(self, node: Mapping[str, Any], name: str, chooser: Chooser, variable: Variable) -> Filled:
        mark = locate(node, (), ("<space>", 0))
        if "var" in node:
            found, place = variable(node["var"])
            return found, place or mark
        if (id(node), name) not in self._known:
            self._known[id(node), name] = _Node.of(node, name)
        known = self._known[id(node), name]
        if known.limits is not None:
            return chooser.number_in(name, known.limits), mark
        index = known.options.index(chooser.choose(name, known.options))
        found, place = self._fill(node["choice"][index], f"{name}/{known.below[index]}", chooser, variable)
        return found, place or locate(node["choice"], (index,), mark)

    def base(self) -> LocatedMap:
        """Return the document with every node at its first option or lower end."""
        return self.draw(Fixed({}))

    @cached_property
    def size(self) -> Size:
        """The number of distinct settings and of parameters; a variable counts only where it is used."""
        counts = {name: sum(_count(value).values()) for name, value in self.variables.items()}
        total = 0
        for used, count in _count(self.document).items():
            for name in used:
                count *= counts[name]
            total += count
        used_anywhere = set().union(*_count(self.document))
        nodes = [*_nodes(self.document), *(node for name in used_anywhere for node in _nodes(self.variables[name]))]
        ranges = [node for node in nodes if "range" in node]
        continuous = sum(_range(node).num_values is None for node in ranges)
        return Size(total, sum("var" not in node for node in nodes) - continuous, continuous)

    def problems(self) -> list[Problem]:
        """Return what is wrong with the nodes, or, when nothing is, with the form of any single option."""
        found = list(_node_problems(self.document, (), self.variables))
        for name, value in self.variables.items():
            found.extend(_node_problems(value, ("variables", name), None))
        return sorted(set(found)) or self._form_problems()

    def _form_problems(self) -> list[Problem]:
        """Try every option of every node, all others at their first: each must be valid in form."""
        catalog.load_blocks()
        found: set[Problem] = set()
        queue: list[dict[str, Any]] = [{}]
        seen: set[str] = set()
        while queue:
            decided = queue.pop()
            chooser = Fixed(decided)
            document = self.draw(chooser)
            if "name" not in document:
                document.put("name", "candidate", document.mark)
            found.update(_faults(document))
            for name, alternatives in chooser.met.items():
                if name not in seen:
                    seen.add(name)
                    queue.extend({**decided, name: option} for option in alternatives[1:])
        return sorted(found)


@dataclass
class Fixed:
    """Decides by a table, else takes the first option; notes in ``met`` what it was asked."""

    decided: Mapping[str, Any]
    met: dict[str, list[Any]] = field(default_factory=dict)

    def choose(self, name: str, options: Sequence[str]) -> str:
        """Return the option of the table, or the first."""
        self.met[name] = list(options)
        return str(self.decided.get(name, options[0]))

    def number_in(self, name: str, limits: Range) -> float | int:
        """Return the number of the table, or the lower end."""
        ends = [limits.low, limits.high]
        self.met[name] = [int(end) for end in ends] if limits.whole else ends
        found: float | int = self.decided.get(name, self.met[name][0])
        return found


def open_space(document: LocatedMap, variables: LocatedMap) -> Space:
    """Return a checked space.

    Args:
        document: the overlay with its ``extends`` carried out.
        variables: name -> node or value.

    Raises:
        SpecError: with every problem of the nodes and of the options' form.
    """
    space = Space(document, variables)
    problems = space.problems()
    if problems:
        raise SpecError(problems)
    return space


def _faults(document: LocatedMap) -> list[Problem]:
    """Return what is wrong with a drawn document whatever its combination: its form, and names that do not exist."""
    try:
        spec = loading.validated(Spec, document)
    except SpecError as error:
        return list(error.problems)
    return [
        Problem(*locate(document, path, document.mark), dotted(path), message)
        for path, message in legality.check(spec)
        if message.startswith(("unknown ", "no block "))
    ]


def label(option: Any) -> str:
    """Return an option's name: the value itself, a kind with its fields; nodes inside are ``*``."""
    if is_node(option):
        return "*"
    if isinstance(option, Mapping):
        fields = ", ".join(f"{key}: {label(value)}" for key, value in option.items() if key != "kind")
        kind = str(option.get("kind", ""))
        return f"{kind}{{{fields}}}" if fields or not kind else kind
    if isinstance(option, list | tuple):
        return f"[{', '.join(map(label, option))}]"
    if option is None or isinstance(option, bool):
        return {None: "null", True: "true", False: "false"}[option]
    return str(option)


Filled = tuple[Any, Mark | None]  # a value, and where it stands when that is not where its key does
Variable = Callable[[str], Filled]


def option_names(node: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return the names of a choice's options: ``leaf:label``, leaf being the last step of the parameter's name."""
    leaf = name.replace("/", ".").rpartition(".")[2]
    return tuple(f"{leaf}:{label(option)}" for option in node["choice"])


def _names_below(options: Sequence[str]) -> tuple[str, ...]:
    """Return how the options are called in the names of the parameters below them: shortly where that is unique."""
    short = [option.partition(":")[2].partition("{")[0] or option.partition(":")[2] for option in options]
    return tuple(
        brief if short.count(brief) == 1 else option.partition(":")[2]
        for brief, option in zip(short, options, strict=True)
    )


def _range(node: Mapping[str, Any]) -> Range:
    low, high = node["range"]
    step = node.get("step")
    whole = all(isinstance(number, int) for number in (low, high, *([step] if step is not None else [])))
    return Range(low, high, step, bool(node.get("log", False)), whole)


def _nodes(value: Any) -> Iterator[Mapping[str, Any]]:
    if is_node(value):
        yield value
        value = value.get("choice", [])
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _nodes(item)
    elif isinstance(value, list):
        for item in value:
            yield from _nodes(item)


def _count(value: Any) -> dict[frozenset[str], int]:
    """Return the number of settings below a value, by the set of variables they use."""
    if is_node(value):
        if "var" in value:
            return {frozenset([value["var"]]): 1}
        if "range" in value:
            return {frozenset(): _range(value).num_values or 1}
        total: dict[frozenset[str], int] = {}
        for option in value["choice"]:
            for used, count in _count(option).items():
                total[used] = total.get(used, 0) + count
        return total
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    product = {frozenset[str](): 1}
    for item in items:
        longer: dict[frozenset[str], int] = {}
        for used, count in _count(item).items():
            for before, times in product.items():
                longer[used | before] = longer.get(used | before, 0) + count * times
        product = longer
    return product


def _node_problems(value: Any, path: Path, variables: LocatedMap | None) -> Iterator[Problem]:
    """Yield the problems of the nodes at and below a value; ``variables`` None: inside a variable."""
    if is_node(value):
        yield from _one_node_problems(value, path, variables)
        for index, option in enumerate(value["choice"] if isinstance(value.get("choice"), list) else []):
            yield from _node_problems(option, (*path, "choice", index), variables)
        return
    if isinstance(value, LocatedMap):
        for key, item in value.items():
            if key in FIXED_KEYS and list(_nodes(item)):
                message = f"a node cannot stand for {key!r}; put the node one level higher, with whole options."
                yield Problem(*value.marks.get(key, value.mark), dotted((*path, key)), message)
            else:
                yield from _node_problems(item, (*path, key), variables)
    elif isinstance(value, LocatedList):
        for index, item in enumerate(value):
            yield from _node_problems(item, (*path, index), variables)


def _one_node_problems(node: Mapping[str, Any], path: Path, variables: LocatedMap | None) -> Iterator[Problem]:
    mark = locate(node, (), ("<space>", 0))

    def problem(message: str) -> Problem:
        return Problem(*mark, dotted(path), message)

    kinds = [key for key in NODE_KEYS if key in node]
    allowed = {"choice": {"choice"}, "range": {"range", "log", "step"}, "var": {"var"}}[kinds[0]]
    for key in node:
        if key not in allowed:
            yield problem(f"unknown key {key!r} beside {kinds[0]!r}; known here: {', '.join(sorted(allowed))}.")
    if kinds[0] == "choice":
        yield from map(problem, _choice_faults(node["choice"]))
    elif kinds[0] == "range":
        yield from map(problem, _range_faults(node))
    elif variables is None:
        yield problem("a variable cannot refer to another; write its options here.")
    elif not isinstance(node["var"], str) or node["var"] not in variables:
        known = sorted(variables)
        hint = nearest(str(node["var"]), known)
        yield problem(f"unknown variable {node['var']!r}; known: {', '.join(known) or 'none'}.{hint}")


def _choice_faults(options: Any) -> Iterator[str]:
    if not isinstance(options, list) or not options:
        yield "'choice' must be a list of at least one value."
        return
    labels = [label(option) for option in options]
    for text in sorted({text for text in labels if labels.count(text) > 1}):
        yield f"the option {text} stands twice; keep one."


def _range_faults(node: Mapping[str, Any]) -> Iterator[str]:
    ends, step, log = node["range"], node.get("step"), node.get("log", False)
    if not isinstance(ends, list) or len(ends) != 2 or not all(_is_number(end) for end in ends):
        yield "'range' must be two numbers, [low, high]."
        return
    low, high = ends
    if low >= high:
        yield f"the range [{low}, {high}] is empty; required: low < high."
    if not isinstance(log, bool):
        yield f"found log: {log}; required: true or false."
    elif log and low <= 0:
        yield f"a logarithmic range must start above 0; found {low}."
    elif log and step is not None:
        yield "a logarithmic range has no step; remove one of the two."
    if step is not None and (not _is_number(step) or step <= 0):
        yield f"found step: {step}; required: a positive number."
    elif step is not None and low < high and step > high - low:
        yield f"the step {step} is wider than the range [{low}, {high}]."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
