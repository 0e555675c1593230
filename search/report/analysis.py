"""What ``archspec analyze`` prints, and the same for the report: influences of drawn values, and maps of choices."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.text import Text

from archspec.errors import RunError, unknown
from archspec.search.correlation import ENOUGH
from archspec.search.influence import Influence, influences, known_for
from archspec.search.names import Objective
from archspec.search.records import Run
from archspec.search.report.axes import along
from archspec.search.report.choicemap import ENOUGH_IN_A_CELL, Cell, ChoiceMap, choice_maps
from archspec.search.report.figures import Column, columns_of, number
from archspec.search.report.text import Row, Table, wrapped

LEVELS = 5  # shades of a heat map
SHADES = " ░▒▓█"


def metric_of(run: Run, name: str | None) -> tuple[Objective, Column]:
    """Return what to analyse: the named figure, or the first objective.

    Raises:
        UsageError: when the run has no such figure.
        RunError: when it has no objective.
    """
    if name is None and not run.objectives:
        raise RunError(f"{run.folder}: {unknown('objective', '', [])}")
    goal = run.objectives[0] if name is None else along(run, [name], {})[0].objectives[0]
    return goal, next(column for column in columns_of(run) if column.key == goal.name)


def evidence_note(run: Run, goal: Objective) -> str:
    """Return over how many trials a figure is analysed, and what that allows to be said."""
    n = len(known_for(run, goal))
    sort = "sampled trials that have it"
    if n < ENOUGH:
        return f"{n} {sort}: not enough evidence; required: at least {ENOUGH}. What follows only lists what was seen."
    return (
        f"Over the {n:,} {sort}. Many were selected by promotion and preferred by the sampler, so this says how they "
        "did, not what a choice does by itself. 'share' is of the rank variance, and p of so large a share by chance."
    )


def analysis_lines(run: Run, goal: Objective, column: Column, width: int) -> list[Text | str]:
    """Return the influences on a figure and its maps."""
    title = f"{column.label} {'↑' if goal.direction == 'maximize' else '↓'}"
    lines: list[Text | str] = [Text(title, style="bold"), *wrapped(evidence_note(run, goal), width), ""]
    found = influences(run, goal)
    table = Table(["drawn value", ">share", ">p", ">PED-ANOVA", ">n", "best", "verdict"], stretch=0)
    table.rows.extend(_influence_row(item) for item in found)
    lines += [Text("influence of drawn values", style="bold"), *(table.render(width) if found else ["  none drawn"])]
    for item in choice_maps(run, goal):
        lines += ["", *map_lines(item, column, goal, width)]
    return lines


def map_lines(item: ChoiceMap, column: Column, goal: Objective, width: int) -> list[Text]:
    """Return a map as a matrix where it fits, and as a list of cells otherwise."""
    head = f"{item.axes[0]} x {item.axes[1]}: {column.label}, mean / best (trials)"
    lines = [Text(line, style="bold") for line in wrapped(head, width)]
    found = "" if item.p is None else f", p = {item.p:.3f}"
    lines += [Text(line) for line in wrapped(f"{item.n} trials: {item.verdict}{found}", width)]
    matrix = Table([item.axes[0], *item.columns], stretch=0)
    for row in item.rows:
        matrix.rows.append(Row([row, *(_cell_text(item, row, name, column, goal) for name in item.columns)]))
    widest = [max(len(cells) for cells in col) for col in zip(*(row.cells for row in matrix.rows), strict=True)]
    wide = sum(max(a, len(b)) for a, b in zip(widest, matrix.headings, strict=True)) + 2 * len(widest)
    if wide <= width:
        return lines + matrix.render(width)
    listed = Table([*item.axes, "", ">mean", ">best", ">n"], stretch=0)
    for cell in sorted(item.cells, key=lambda cell: goal.loss(cell.mean)):
        values = [number(value, column.unit) for value in (cell.mean, cell.best)]
        style = "dim" if cell.n < ENOUGH_IN_A_CELL else ""
        listed.rows.append(Row([cell.row, cell.column, _shade(item, cell, goal), *values, str(cell.n)], style=style))
    return lines + listed.render(width)


def analysis_data(run: Run, goal: Objective) -> dict[str, Any]:
    """Return the same as plain data."""
    return {
        "objective": goal.as_dict(),
        "note": evidence_note(run, goal),
        "n": len(known_for(run, goal)),
        "influences": [asdict(item) for item in influences(run, goal)],
        "maps": [asdict(item) for item in choice_maps(run, goal)],
    }


def report_analysis(run: Run) -> list[dict[str, Any]]:
    """Return what the page shows of every objective that is measured; predicted figures follow from the spec."""
    columns = {column.key: column for column in columns_of(run)}
    predicted = {name for trial in run for name in trial.figures}
    measured = [goal for goal in run.objectives if goal.name not in predicted]
    return [_page(run, goal, columns[goal.name]) for goal in measured if known_for(run, goal)]


def levels(item: ChoiceMap, goal: Objective) -> dict[tuple[str, str], int]:
    """Return each cell's shade by its mean, from 0 (worst) to ``LEVELS - 1`` (best)."""
    losses = {(cell.row, cell.column): goal.loss(cell.mean) for cell in item.cells}
    worst, best = max(losses.values(), default=0.0), min(losses.values(), default=0.0)
    width = worst - best
    return {pair: round((worst - loss) / width * (LEVELS - 1)) if width else 0 for pair, loss in losses.items()}


def _page(run: Run, goal: Objective, column: Column) -> dict[str, Any]:
    rows = [_influence_row(item).cells for item in influences(run, goal, ped_anova=False)]
    maps = []
    for item in choice_maps(run, goal):
        shades = levels(item, goal)
        cells = [
            [_page_cell(item.cell(row, name), shades.get((row, name)), column) for name in item.columns]
            for row in item.rows
        ]
        p = "" if item.p is None else f", p = {item.p:.3f}"
        told = f"{item.n:,} trials: {item.verdict}{p}"
        maps.append({"axes": item.axes, "rows": item.rows, "columns": item.columns, "cells": cells, "note": told})
    kept = [[row[0], row[1], row[2], row[4], row[5], row[6]] for row in rows]
    return {"label": column.label, "note": evidence_note(run, goal), "influences": kept, "maps": maps}


def _page_cell(cell: Cell | None, shade: int | None, column: Column) -> dict[str, Any] | None:
    if cell is None:
        return None
    mean, best = number(cell.mean, column.unit), number(cell.best, column.unit)
    return {"mean": mean, "best": best, "n": cell.n, "level": shade, "few": cell.n < ENOUGH_IN_A_CELL}


def _influence_row(item: Influence) -> Row:
    share, other = ("-" if value is None else f"{value:.2f}" for value in (item.share, item.ped_anova))
    p = "-" if item.p is None else f"{item.p:.3f}"
    best = "-" if item.best is None else f"{item.best[0]} ({item.best[1]})"
    style = "" if item.verdict == "matters" else "dim"
    return Row([item.parameter, share, p, other, str(item.n), best, item.verdict], style=style)


def _cell_text(item: ChoiceMap, row: str, name: str, column: Column, goal: Objective) -> str:
    cell = item.cell(row, name)
    if cell is None:
        return "·"
    mean, best = number(cell.mean, column.unit), number(cell.best, column.unit)
    return f"{_shade(item, cell, goal)} {mean} / {best} ({cell.n})"


def _shade(item: ChoiceMap, cell: Cell, goal: Objective) -> str:
    return SHADES[levels(item, goal)[cell.row, cell.column]]
