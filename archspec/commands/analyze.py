"""``archspec analyze RUN``: what drawn values and choices did to a figure, and whether there is evidence for it."""

from __future__ import annotations

import argparse
import json
from typing import Any

from archspec.errors import EXIT_OK


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser("analyze", help="show which choices of a search mattered", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN", help="a run's folder, or the name of a study under runs/")
    parser.add_argument("--metric", metavar="NAME", help="a recorded figure (default: the first objective)")
    parser.add_argument("--json", action="store_true", help="data instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print influences and heat maps."""
    from archspec.search.report.analysis import analysis_data, analysis_lines, metric_of
    from archspec.search.report.lookup import find_run
    from archspec.search.report.tables import heading
    from archspec.search.report.text import console, show

    found = find_run(args.run_dir)
    goal, column = metric_of(found, args.metric)
    if args.json:
        print(json.dumps(analysis_data(found, goal), indent=2))
        return EXIT_OK
    out = console()
    show([*heading(found, out.width), "", *analysis_lines(found, goal, column, out.width)], out)
    return EXIT_OK
