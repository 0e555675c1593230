"""YAML text to plain data that remembers where it stood: strict, safe and bounded.

Differences from PyYAML's own loading, each because a spec would otherwise change its meaning silently: ``3:1`` is
text and ``1e-3`` a number, ``no`` is text, duplicate keys are errors, and anchors, aliases, tags and merge keys do
not exist. Depth, size and the length of a scalar are bounded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from archspec.errors import Problem, SpecError

MAX_BYTES = 1_000_000
MAX_DEPTH = 40
MAX_SCALAR = 10_000
MAX_DIGITS = 18

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
_FLOAT = re.compile(r"[-+]?([0-9]+(_[0-9]+)*\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = {"": None, "null": None, "true": True, "false": False}

Mark = tuple[str, int]


class LocatedMap(dict[str, Any]):
    """A mapping that knows where it and each of its keys stand: (file, line)."""

    def __init__(self, mark: Mark, *args: Any) -> None:
        super().__init__(*args)
        self.mark = mark
        self.marks: dict[str, Mark] = {}

    def put(self, key: str, value: Any, mark: Mark) -> None:
        """Set a key and where it stands."""
        self[key] = value
        self.marks[key] = mark


class LocatedList(list[Any]):
    """A list that knows where it and each of its items stand."""

    def __init__(self, mark: Mark, *args: Any) -> None:
        super().__init__(*args)
        self.mark = mark
        self.marks: list[Mark] = []


def locate(data: Any, path: tuple[str | int, ...], default: Mark) -> Mark:
    """Return where the deepest existing part of ``path`` stands in ``data``."""
    mark: Mark = getattr(data, "mark", default)
    for step in path:
        if isinstance(data, LocatedMap) and step in data:
            mark = data.marks.get(str(step), mark)
            data = data[str(step)]
        elif isinstance(data, LocatedList) and isinstance(step, int) and step < len(data):
            mark = data.marks[step] if step < len(data.marks) else mark
            data = data[step]
        else:
            break
    return mark


@dataclass
class _Open:
    """A collection whose end has not been read yet."""

    value: LocatedMap | LocatedList
    key: str | None = None
    key_mark: Mark = ("", 0)
    waits_for_key: bool = True


class _Composer:
    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self.stack: list[_Open] = []
        self.root: Any = None
        self.has_root = False

    def fail(self, line: int, message: str) -> None:
        keys = [str(frame.key) for frame in self.stack if frame.key is not None]
        self.problems.append(Problem(self.file, line, ".".join(keys), message))

    def take(self, event: yaml.Event) -> None:
        line = event.start_mark.line + 1 if event.start_mark is not None else 0
        if isinstance(event, yaml.AliasEvent):
            self.fail(line, f"found the alias *{event.anchor}; aliases are not part of the language: use 'extends'.")
            self.place(None, line, text=None)
        elif isinstance(event, yaml.DocumentStartEvent) and self.has_root:
            self.fail(line, "found a second document; a file holds one.")
        elif isinstance(event, yaml.ScalarEvent):
            self.check(event, line)
            plain = event.style is None
            self.place(self.scalar(event.value, line) if plain else event.value, line, text=event.value)
        elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            self.check(event, line)
            kind = LocatedMap if isinstance(event, yaml.MappingStartEvent) else LocatedList
            value = kind((self.file, line))
            self.place(value, line, text=None)
            self.stack.append(_Open(value))
            if len(self.stack) > MAX_DEPTH:
                message = f"nested deeper than {MAX_DEPTH} levels; flatten the document."
                raise SpecError([Problem(self.file, line, "", message)])
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            self.stack.pop()
            if self.stack:
                self.stack[-1].key = None

    def check(self, event: Any, line: int) -> None:
        if event.anchor is not None:
            self.fail(line, f"found the anchor &{event.anchor}; anchors are not part of the language: use 'extends'.")
        if event.tag is not None:
            self.fail(line, f"found the tag {event.tag}; tags are not part of the language.")

    def scalar(self, text: str, line: int) -> Any:
        if len(text) > MAX_SCALAR:
            self.fail(line, f"a value of {len(text)} characters; at most {MAX_SCALAR} are allowed.")
            return None
        if text in _WORDS:
            return _WORDS[text]
        if _INTEGER.fullmatch(text):
            if len(text) > MAX_DIGITS:
                self.fail(line, f"a number of {len(text)} digits; at most {MAX_DIGITS} are allowed.")
                return None
            return int(text)
        if _FLOAT.fullmatch(text):
            number = float(text)
            if number in (float("inf"), float("-inf")):
                self.fail(line, f"the number {text[:40]} is too large.")
                return None
            return number
        return text

    def place(self, value: Any, line: int, text: str | None) -> None:
        if not self.stack:
            self.root, self.has_root = value, True
            return
        frame = self.stack[-1]
        if isinstance(frame.value, LocatedList):
            frame.value.append(value)
            frame.value.marks.append((self.file, line))
        elif frame.waits_for_key:
            self.open_key(frame, value, line, text)
        else:
            if frame.key is not None:
                frame.value.put(frame.key, value, frame.key_mark)
            frame.waits_for_key = True
            if not isinstance(value, LocatedMap | LocatedList):
                frame.key = None

    def open_key(self, frame: _Open, value: Any, line: int, text: str | None) -> None:
        frame.waits_for_key = False
        frame.key_mark = (self.file, line)
        frame.key = None
        if not isinstance(value, str):
            found = repr(text) if text is not None else "a collection"
            self.fail(line, f"found {found} as a key; keys are text (quote it if it is a name).")
        elif value == "<<":
            self.fail(line, "found the merge key '<<'; it is not part of the language: use 'extends'.")
        elif value in frame.value:
            first = locate(frame.value, (value,), frame.value.mark)[1]
            self.fail(line, f"the key {value!r} stands twice here (first at line {first}); keep one.")
        else:
            frame.key = value


def parse(text: str | bytes, file: str) -> Any:
    """Return the data of one YAML document, with positions.

    Raises:
        SpecError: for anything that is not one bounded document of mappings, lists and scalars; problems that do
            not hide others are reported together.
    """
    size = len(text)
    if size > MAX_BYTES:
        raise SpecError([Problem(file, 0, "", f"{size} bytes; a document has at most {MAX_BYTES}.")])
    composer = _Composer(file)
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            composer.take(event)
    except UnicodeDecodeError as error:
        raise SpecError([Problem(file, 0, "", f"not UTF-8 text: {error.reason} at byte {error.start}.")]) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = f"not YAML: {error.problem or error.context}."
        problem = Problem(file, mark.line + 1 if mark else 0, "", message)
        raise SpecError([*composer.problems, problem]) from None
    except (yaml.YAMLError, ValueError) as error:
        raise SpecError([Problem(file, 0, "", f"not YAML: {' '.join(str(error).split())}.")]) from None
    if composer.problems:
        raise SpecError(composer.problems)
    return composer.root
