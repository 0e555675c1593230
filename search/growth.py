"""A space that grows: which changes of a search file only add to its space, so that a run may go on with its history.

Options may be appended to a choice, also within an option, and a range may be widened, its steps staying where they
were. Everything else is another search: what was drawn would not be a draw of the new file. Options keep their names,
so that a trial drawn before means the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from archspec.loading import is_node
from archspec.search.space import label

GROWING = ("space", "variables")


class NotGrowth(Exception):  # noqa: N818 - an answer, not an error
    """A change that does more than add to the space."""


def additions(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return what the spaces of two plain search files differ by, one line each.

    Raises:
        NotGrowth: when ``after`` does more than add.
    """
    return [line for key in GROWING for line in _added(before.get(key), after.get(key), key)]


def _added(before: Any, after: Any, path: str) -> Iterator[str]:
    if before == after:
        return
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        if before.keys() != after.keys():
            raise NotGrowth(path)
        if is_node(before) and "choice" in before:
            yield from _added_options(before["choice"], after["choice"], path)
        elif is_node(before) and "range" in before:
            yield from _widened(before, after, path)
        else:
            for key in before:
                yield from _added(before[key], after[key], f"{path}.{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after, strict=True)):
            yield from _added(*pair, f"{path}[{index}]")
    else:
        raise NotGrowth(path)


def _added_options(before: list[Any], after: list[Any], path: str) -> Iterator[str]:
    if len(after) < len(before):
        raise NotGrowth(path)
    for old, new in zip(before, after, strict=False):
        if label(old) != label(new):
            raise NotGrowth(path)
        yield from _added(old, new, f"{path}/{label(old)}")
    for option in after[len(before) :]:
        yield f"{path}: + {label(option)}"


def _widened(before: Mapping[str, Any], after: Mapping[str, Any], path: str) -> Iterator[str]:
    (low, high), (lower, higher) = before["range"], after["range"]
    same = {key: value for key, value in before.items() if key != "range"} == {
        key: value for key, value in after.items() if key != "range"
    }
    whole = [isinstance(end, int) for end in (low, high)] == [isinstance(end, int) for end in (lower, higher)]
    steps = (low - lower) / before.get("step", 1)
    aligned = "step" not in before or abs(steps - round(steps)) < 1e-9
    if not (same and whole and aligned and lower <= low and higher >= high):
        raise NotGrowth(path)
    yield f"{path}: [{low}, {high}] -> [{lower}, {higher}]"
