"""``archspec list``: the shipped models and the choices that a spec can make."""

from __future__ import annotations

import argparse
import json
from typing import Any

from archspec.errors import EXIT_OK


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "list", help="list the shipped models, every choice, or which models make each choice", description=__doc__
    )
    parser.add_argument(
        "what", nargs="?", choices=("models", "choices", "components"), default="models", help="default: models"
    )
    parser.add_argument("--context", type=int, default=2048, help="tokens, for the state bytes (default: 2048)")
    parser.add_argument("--bibtex", action="store_true", help="the models' sources as BibTeX")
    parser.add_argument("--markdown", action="store_true", help="the components as the page docs/components.md")
    parser.add_argument("--json", action="store_true", help="data instead of a table")
    parser.add_argument("--plugin", action="append", metavar="MODULE", help="a module that defines components")
    parser.set_defaults(run=run, usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    from archspec import zoo

    if args.markdown:
        if args.what != "components":
            args.usage_error(f"--markdown: only 'components' is a page, and found {args.what!r}; leave it out")
        print(zoo.components_page(), end="")
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
    else:
        _print(rows)
    return EXIT_OK


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
