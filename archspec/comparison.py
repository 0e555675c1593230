"""Two specs choice by choice, in their normal forms: what ``archspec diff`` shows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from archspec.canonical import canonical
from archspec.program import RunLayer, unroll
from archspec.schema import Spec

ABSENT = "-"


def differences(first: Spec, second: Spec) -> list[tuple[str, str, str]]:
    """Return (path, value in the first, value in the second) wherever two architectures differ.

    Both are taken in normal form, so that spelling, defaults and block names never show. Blocks are compared in
    the order in which layers first use them; ``layers`` is which of them runs where.
    """
    sides = [dict(_leaves(_outline(spec))) for spec in (first, second)]
    found = []
    for path in dict.fromkeys([*sides[0], *sides[1]]):
        values = [side.get(path, ABSENT) for side in sides]
        if values[0] != values[1]:
            found.append((path, values[0], values[1]))
    return found


def _outline(spec: Spec) -> dict[str, Any]:
    form = canonical(spec)
    program = unroll(spec.layout)
    order = [step[2] for step in form["layers"] if step[0] == "layer"]
    runs = [step for step in program.instructions if isinstance(step, RunLayer)]
    return {
        "model_dim": form["model_dim"],
        "input": form["input"],
        "output": form["output"],
        "norm": form["norm"],
        "blocks": {str(index): block for index, block in enumerate(form["blocks"])},
        "layers": " ".join(str(index) for index in order),
        "loops": [step for step in form["layers"] if step[0] != "layer"],
        "weights": "shared" if len(runs) > len(program.blocks) else "own",
    }


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    elif value not in (None, [], {}):
        yield path.removesuffix(".kind"), str(value)
