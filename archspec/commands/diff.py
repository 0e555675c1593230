"""``archspec diff A B``: two specs choice by choice, in their normal forms."""

from __future__ import annotations

import argparse
import json
from typing import Any

from archspec.errors import EXIT_OK


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser("diff", help="compare two specs choice by choice", description=__doc__)
    parser.add_argument("first", metavar="A", help="a spec or a shipped model's name")
    parser.add_argument("second", metavar="B", help="another")
    parser.add_argument("--json", action="store_true", help="data instead of a table")
    parser.add_argument("--plugin", action="append", metavar="MODULE", help="a module that defines components")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print where the two differ; nothing but a line when they are the same architecture."""
    from archspec.comparison import differences
    from archspec.loading import load

    first, second = load(args.first), load(args.second)
    rows = differences(first, second)
    if args.json:
        print(json.dumps([{"path": path, "first": a, "second": b} for path, a, b in rows], indent=2))
    elif not rows:
        print(f"{first.name} and {second.name} are the same architecture")
    else:
        _print(rows, first.name, second.name)
    return EXIT_OK


def _print(rows: list[tuple[str, str, str]], first: str, second: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("choice", first, second):
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        table.add_row(*(Text(value) for value in row))
    Console(highlight=False, markup=False).print(table)
