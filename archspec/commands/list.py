"""``archspec list``: the shipped models and the choices that a spec can make."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from archspec.commands import positive
from archspec.errors import EXIT_OK


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "list", help="list the shipped models, every choice, or which models make each choice", description=__doc__
    )
    parser.add_argument(
        "what", nargs="?", choices=("models", "choices", "components"), default="models", help="default: models"
    )
    parser.add_argument("--context", type=positive, default=2048, help="tokens, for the state bytes (default: 2048)")
    parser.add_argument("--bibtex", action="store_true", help="the models' sources as BibTeX")
    parser.add_argument(
        "--markdown", action="store_true", help="the models or components as a page: docs/zoo.md, docs/components.md"
    )
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="with --markdown: scores of the models, from benchmarks.zoo"
    )
    parser.add_argument("--json", action="store_true", help="data instead of a table")
    parser.add_argument("--plugin", action="append", metavar="MODULE", help="a module that defines components")
    parser.set_defaults(run=run, usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    from archspec import zoo

    if args.results is not None and not (args.markdown and args.what == "models"):
        args.usage_error("--results: only the page of the models has scores; write --markdown, or leave it out")
    if args.markdown:
        if args.what == "choices":
            args.usage_error("--markdown: only 'models' and 'components' are pages, and found 'choices'; leave it out")
        results = None if args.results is None else zoo.training(args.results)
        print(zoo.page(results, args.context) if args.what == "models" else zoo.components_page(), end="")
        return EXIT_OK
    if args.what == "choices":
        rows = zoo.choices()
    elif args.what == "components":
        rows = zoo.components()
    else:
        entries = zoo.models(args.context)
        if args.bibtex:
            print(zoo.bibtex(entries))
            return EXIT_OK
        rows = entries
    if args.json:
        print(json.dumps(rows, indent=2))
    elif args.what == "models":
        _print_models(rows)
    else:
        _print(rows)
    return EXIT_OK


WIDE = 118  # columns of the terminal that the table of models needs to stand in one piece
AXES = ("memory", "bias", "retention", "update")
FACTS = ("family", "state", "time", "fidelity", "source")


def _print_models(rows: list[dict[str, Any]]) -> None:
    """Print the models: one table, or on a narrow terminal coordinates and facts one below the other."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if console.width >= WIDE:
        console.print(_models_table(rows, (*AXES, *FACTS)))
        return
    console.print(_models_table(rows, AXES))
    console.print()
    console.print(_models_table(rows, FACTS))


def _models_table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> Any:
    """Lay out models, several mixers of one below each other."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("name", overflow="fold", max_width=21)
    for column in columns:
        folded = column == "source"
        table.add_column(
            column,
            justify="right" if column == "state" else "left",
            overflow="fold",
            no_wrap=not folded,
            max_width=10 if folded else None,
        )
    for row in rows:
        shown = {**row, "state": _bytes(row["state_bytes"]), "source": row["source"].removeprefix("arXiv:")}
        shown["retention"] = re.sub(r"\(\w+/(\w+)\)", r"/\1", row["retention"])
        shown["memory"] = re.sub(r"\(.*?\)", "", row["memory"])
        table.add_row(*(Text(str(shown[key]).replace(" + ", "\n")) for key in ("name", *columns)))
    return table


def _bytes(number: int) -> str:
    """Return a size in the unit that leaves three digits or so."""
    for power, unit in ((3, "GB"), (2, "MB"), (1, "kB")):
        if number >= 1000**power:
            return f"{number / 1000**power:.3g} {unit}"
    return f"{number} B"


def _print(rows: list[dict[str, Any]]) -> None:
    """Print a table that fits the terminal: on a narrow one, what ``explain`` shows anyway is left out."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False)
    hidden = {"file", "title", "equations", "differs", "layers"}
    if console.width < 110:
        hidden |= {"parameters", "family", "presets"}
    table = Table(box=None, pad_edge=False, header_style="bold")
    shown = [key for key in rows[0] if key not in hidden]
    for key in shown:
        numeric, long = isinstance(rows[0][key], int), key in ("coordinates", "definition", "models")
        table.add_column(key.replace("_", " "), justify="right" if numeric else "left", no_wrap=not long)
    for row in rows:
        table.add_row(*(Text(f"{row[key]:,}" if isinstance(row[key], int) else str(row[key])) for key in shown))
    console.print(table)
