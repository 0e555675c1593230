"""``archspec compare RUN RUN...``: searches side by side, from one reference point."""

from __future__ import annotations

import argparse
import json
from typing import Any

from archspec.errors import EXIT_OK


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser("compare", help="show searches side by side", description=__doc__)
    parser.add_argument("run_dirs", metavar="RUN", nargs="+", help="runs' folders, or names of studies under runs/")
    parser.add_argument("--json", action="store_true", help="data instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the comparison."""
    from archspec.search.report.comparing import compare, comparison_data, comparison_lines
    from archspec.search.report.lookup import find_run
    from archspec.search.report.text import console, show

    found = compare([find_run(name) for name in args.run_dirs])
    if args.json:
        print(json.dumps(comparison_data(found), indent=2))
        return EXIT_OK
    out = console()
    show(comparison_lines(found, out.width), out)
    return EXIT_OK
